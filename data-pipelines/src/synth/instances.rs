//! Instances of the tasks: what goes into a template's places, and the answer.

use super::dice::Dice;
use super::words::{
    ACTIVITIES, CATEGORIES, COLOURS, Category, DAYS, DIGITS, LETTERS, NAMES, NEGATIVE, NUMBER_WORDS, OBJECTS, OPPOSITES, PLACES, POSITIVE,
    Polarity,
};

/// One instance of a task.
pub(crate) struct Instance {
    /// Value of each place of the template.
    pub(crate) fields: Vec<(&'static str, String)>,
    /// The right answer.
    pub(crate) answer: String,
}

impl Instance {
    fn new<const N: usize>(fields: [(&'static str, String); N], answer: impl Into<String>) -> Self {
        Self { fields: fields.into(), answer: answer.into() }
    }
}

/// A review of a `thing` in one or two sentences of one polarity, sometimes with a neutral sentence before them.
pub(crate) fn sentiment(dice: &mut Dice, thing: &str, parts: &[&str]) -> Instance {
    let polarity = if dice.once_in(2) { POSITIVE } else { NEGATIVE };
    let mut sentences = Vec::new();
    if dice.once_in(3) {
        sentences.push(format!("It was {}.", dice.pick(&DAYS)));
    }
    for part in dice.pick_distinct(parts, 2) {
        sentences.push(opinion(dice, polarity, part));
    }
    Instance::new([("text", sentences.join(" ")), ("thing", thing.to_owned())], polarity.label)
}

fn opinion(dice: &mut Dice, polarity: Polarity, part: &str) -> String {
    let adjective = dice.pick(polarity.adjectives);
    match dice.below(3) {
        0 => format!("The {part} was {adjective}."),
        1 => format!("I {} the {part}.", dice.pick(polarity.verbs)),
        _ => format!("I found the {part} {adjective}."),
    }
}

/// Whether someone is somewhere, from a sentence about it.
pub(crate) fn place_entailment(dice: &mut Dice) -> Instance {
    let [name, other_name] = pick_two(dice, &NAMES);
    let [place, other_place] = pick_two(dice, &PLACES);
    let (premise, answer) = match dice.below(6) {
        0 | 1 => (format!("{name} is in the {place}."), "yes"),
        2 => (format!("{name} is not in the {place}."), "no"),
        3 => (format!("{name} is in the {other_place}."), "no"),
        4 => (format!("Perhaps {name} is in the {place}."), "maybe"),
        _ => (format!("Perhaps {other_name} is in the {place}."), "maybe"),
    };
    entailment(premise, format!("{name} is in the {place}"), answer)
}

/// Whether someone has something.
pub(crate) fn ownership_entailment(dice: &mut Dice) -> Instance {
    let name = dice.pick(&NAMES);
    let object = dice.pick(&OBJECTS);
    let (premise, answer) = match dice.below(3) {
        0 => (format!("{name} has a {object}."), "yes"),
        1 => (format!("{name} has no {object}."), "no"),
        _ => (format!("Perhaps {name} has a {object}."), "maybe"),
    };
    entailment(premise, format!("{name} has a {object}"), answer)
}

/// Whether someone does something.
pub(crate) fn activity_entailment(dice: &mut Dice) -> Instance {
    let [name, other_name] = pick_two(dice, &NAMES);
    let activity = dice.pick(&ACTIVITIES);
    let (premise, answer) = match dice.below(6) {
        0 | 1 => (format!("{name} is {activity}."), "yes"),
        2 | 3 => (format!("{name} is not {activity}."), "no"),
        4 => (format!("Perhaps {name} is {activity}."), "maybe"),
        _ => (format!("Perhaps {other_name} is {activity}."), "maybe"),
    };
    entailment(premise, format!("{name} is {activity}"), answer)
}

fn entailment(premise: String, hypothesis: String, answer: &str) -> Instance {
    Instance::new([("premise", premise), ("hypothesis", hypothesis)], answer)
}

/// A sum. Some have two digits, which are two tokens, for the single-token filter to drop.
pub(crate) fn addition(dice: &mut Dice) -> Instance {
    let first = dice.below(8);
    // Up to two past nine, so that about one sum in seven has two digits.
    let second = dice.below((12 - first).min(7));
    arithmetic(format!("{first} plus {second}"), (first + second).to_string())
}

/// A difference that is not negative.
pub(crate) fn subtraction(dice: &mut Dice) -> Instance {
    let first = dice.below(10);
    let second = dice.below(first + 1);
    arithmetic(format!("{first} minus {second}"), (first - second).to_string())
}

/// The number after one; ten has two digits.
pub(crate) fn next_number(dice: &mut Dice) -> Instance {
    let number = dice.below(10);
    arithmetic(format!("the number after {number}"), (number + 1).to_string())
}

/// The number before one; one time in ten the answer is in words, for the single-token filter to drop.
pub(crate) fn previous_number(dice: &mut Dice) -> Instance {
    let number = 1 + dice.below(9);
    let answer = if dice.once_in(10) { format!("it is {}", NUMBER_WORDS[number - 1]) } else { (number - 1).to_string() };
    arithmetic(format!("the number before {number}"), answer)
}

/// A number word as a digit.
pub(crate) fn number_word(dice: &mut Dice) -> Instance {
    let number = dice.below(10);
    arithmetic(format!("the number {}", NUMBER_WORDS[number]), DIGITS[number])
}

fn arithmetic(expression: String, answer: impl Into<String>) -> Instance {
    Instance::new([("expression", expression)], answer)
}

/// The colour of one of several things, each named in a sentence that `phrase` makes of thing and colour.
pub(crate) fn lookup(dice: &mut Dice, num_facts: usize, things: &[&str], phrase: fn(&str, &str) -> String) -> Instance {
    let things = dice.pick_distinct(things, num_facts);
    let colours = dice.pick_distinct(&COLOURS, num_facts);
    let facts: Vec<String> = things.iter().zip(&colours).map(|(thing, colour)| phrase(thing, colour)).collect();
    let asked = dice.below(num_facts);
    Instance::new([("facts", facts.join(" ")), ("thing", things[asked].to_owned())], colours[asked])
}

/// Four options of which one is of the category. The others are furniture, which is never asked for, so that a small model
/// learns to name a letter within a few hundred steps.
pub(crate) fn choice(dice: &mut Dice, category: Category) -> Instance {
    let right = dice.pick(category.words);
    let wrong = dice.pick_distinct(CATEGORIES[5].words, 3);
    let (mut fields, answer) = options(dice, right, wrong);
    fields.push(("kind", category.phrase.to_owned()));
    Instance { fields, answer }
}

/// Four options of which three are of one category; the answer is the fourth.
pub(crate) fn odd_one_out(dice: &mut Dice) -> Instance {
    let [category, other] = pick_two(dice, &CATEGORIES);
    let right = dice.pick(other.words);
    let wrong = dice.pick_distinct(category.words, 3);
    let (fields, answer) = options(dice, right, wrong);
    Instance { fields, answer }
}

/// Puts the right option at a random letter among the three wrong ones.
fn options<'a>(dice: &mut Dice, right: &'a str, mut words: Vec<&'a str>) -> (Vec<(&'static str, String)>, String) {
    let place = dice.below(words.len() + 1);
    words.insert(place, right);
    let fields = ["a", "b", "c", "d"].into_iter().zip(words).map(|(letter, word)| (letter, word.to_owned())).collect();
    (fields, LETTERS[place].to_owned())
}

/// The category of a word that `phrase` puts into context.
pub(crate) fn category(dice: &mut Dice, phrase: fn(&str) -> String) -> Instance {
    let category = dice.pick(&CATEGORIES);
    let word = dice.pick(category.words);
    Instance::new([("word", phrase(word))], category.name)
}

/// Whether a word is of a category; half of the time it is.
pub(crate) fn membership(dice: &mut Dice, category: Category) -> Instance {
    let (source, answer) = if dice.once_in(2) { (category, "yes") } else { (dice.pick(&all_but(category)), "no") };
    let word = dice.pick(source.words);
    Instance::new([("word", word.to_owned()), ("kind", category.phrase.to_owned())], answer)
}

fn all_but(category: Category) -> Vec<Category> {
    CATEGORIES.into_iter().filter(|other| other.name != category.name).collect()
}

/// The larger or the smaller of two digits.
pub(crate) fn comparison(dice: &mut Dice, larger: bool) -> Instance {
    let [first, second] = pick_two(dice, &DIGITS);
    // Digits of one character compare as their numbers do.
    let answer = if larger { first.max(second) } else { first.min(second) };
    let relation = if larger { "larger" } else { "smaller" };
    Instance::new([("first", first.to_owned()), ("second", second.to_owned()), ("relation", relation.to_owned())], answer)
}

/// Whether a digit is larger than five or smaller than five.
pub(crate) fn threshold(dice: &mut Dice) -> Instance {
    let number = dice.pick(&[0usize, 1, 2, 3, 4, 6, 7, 8, 9]);
    let (relation, holds) = if dice.once_in(2) { ("larger", number > 5) } else { ("smaller", number < 5) };
    let answer = if holds { "yes" } else { "no" };
    Instance::new([("first", number.to_string()), ("relation", relation.to_owned())], answer)
}

/// Whether a digit is even or odd.
pub(crate) fn parity(dice: &mut Dice) -> Instance {
    let number = dice.below(10);
    Instance::new([("number", number.to_string())], if number.is_multiple_of(2) { "even" } else { "odd" })
}

/// The opposite of an adjective that `phrase` puts into context.
pub(crate) fn opposite(dice: &mut Dice, phrase: fn(&str) -> String) -> Instance {
    let (first, second) = dice.pick(&OPPOSITES);
    let (word, answer) = if dice.once_in(2) { (first, second) } else { (second, first) };
    Instance::new([("word", phrase(word))], answer)
}

/// Whether two words are the same.
pub(crate) fn same(dice: &mut Dice) -> Instance {
    let [first, other] = pick_two(dice, CATEGORIES[0].words);
    let (second, answer) = if dice.once_in(2) { (first, "same") } else { (other, "different") };
    Instance::new([("first", first.to_owned()), ("second", second.to_owned())], answer)
}

/// The letter that comes first or last in the alphabet, of two.
pub(crate) fn letter_order(dice: &mut Dice) -> Instance {
    let [first, second] = pick_two(dice, &LETTERS);
    let earlier = dice.once_in(2);
    let answer = if earlier { first.min(second) } else { first.max(second) };
    let relation = if earlier { "first" } else { "last" };
    Instance::new([("first", first.to_owned()), ("second", second.to_owned()), ("relation", relation.to_owned())], answer)
}

/// Two different items, of at least two.
fn pick_two<T: Copy>(dice: &mut Dice, items: &[T]) -> [T; 2] {
    let first = dice.below(items.len());
    // Skips `first` without a second try: the rest is one shorter and starts after it.
    let second = (first + 1 + dice.below(items.len() - 1)) % items.len();
    [items[first], items[second]]
}
