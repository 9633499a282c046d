//! The table of tasks: families with their templates, and the tasks that share them.

use super::dice::Dice;
use super::instances::{
    Instance, activity_entailment, addition, category, choice, comparison, letter_order, lookup, membership, next_number, number_word,
    odd_one_out, opposite, ownership_entailment, parity, place_entailment, previous_number, same, sentiment, subtraction, threshold,
};
use super::words::{CATEGORIES, COLOURS, DIGITS, FILM_PARTS, HOTEL_PARTS, OBJECTS, PHONE_PARTS, RESTAURANT_PARTS};

/// Templates shared by the tasks of a family. `{name}` is a place that an instance fills.
pub(crate) struct Family {
    /// Name of the family.
    pub(crate) name: &'static str,
    /// Templates to train on.
    pub(crate) templates: &'static [&'static str],
    /// Templates kept for evaluation: paraphrases of the others. Training files hold rows of them too, marked as held out.
    pub(crate) held_out: &'static [&'static str],
}

/// One task: a family's templates with instances of its own.
pub(crate) struct Task {
    /// Name of the task.
    pub(crate) name: &'static str,
    /// Its family.
    pub(crate) family: &'static Family,
    /// Makes an instance.
    pub(crate) make: fn(&mut Dice) -> Instance,
}

/// One evaluation file: the tasks of a family, with every answer among the labels.
pub(crate) struct EvaluationFile {
    /// Name of the file without its extension.
    pub(crate) name: &'static str,
    /// Family of its tasks.
    pub(crate) family: &'static Family,
    /// The answers that a row may have.
    pub(crate) labels: &'static [&'static str],
}

/// The evaluation files, in the order of their numbers.
pub(crate) static EVALUATION_FILES: [EvaluationFile; 5] = [
    EvaluationFile { name: "sentiment", family: &SENTIMENT, labels: &["positive", "negative"] },
    EvaluationFile { name: "entailment", family: &ENTAILMENT, labels: &["yes", "no", "maybe"] },
    EvaluationFile { name: "arithmetic", family: &ARITHMETIC, labels: &DIGITS },
    EvaluationFile { name: "lookup", family: &LOOKUP, labels: &COLOURS },
    EvaluationFile { name: "choice", family: &CHOICE, labels: &["A", "B", "C", "D"] },
];

/// All tasks, in the order of their numbers.
pub(crate) static TASKS: [Task; 35] = [
    Task { name: "sentiment_film", family: &SENTIMENT, make: |dice| sentiment(dice, "film", &FILM_PARTS) },
    Task { name: "sentiment_restaurant", family: &SENTIMENT, make: |dice| sentiment(dice, "restaurant", &RESTAURANT_PARTS) },
    Task { name: "sentiment_phone", family: &SENTIMENT, make: |dice| sentiment(dice, "phone", &PHONE_PARTS) },
    Task { name: "sentiment_hotel", family: &SENTIMENT, make: |dice| sentiment(dice, "hotel", &HOTEL_PARTS) },
    Task { name: "entailment_place", family: &ENTAILMENT, make: place_entailment },
    Task { name: "entailment_ownership", family: &ENTAILMENT, make: ownership_entailment },
    Task { name: "entailment_activity", family: &ENTAILMENT, make: activity_entailment },
    Task { name: "arithmetic_addition", family: &ARITHMETIC, make: addition },
    Task { name: "arithmetic_subtraction", family: &ARITHMETIC, make: subtraction },
    Task { name: "arithmetic_next", family: &ARITHMETIC, make: next_number },
    Task { name: "arithmetic_previous", family: &ARITHMETIC, make: previous_number },
    Task { name: "arithmetic_word", family: &ARITHMETIC, make: number_word },
    Task { name: "lookup_two_objects", family: &LOOKUP, make: |dice| lookup(dice, 2, &OBJECTS, colour_fact) },
    Task { name: "lookup_three_objects", family: &LOOKUP, make: |dice| lookup(dice, 3, &OBJECTS, colour_fact) },
    Task { name: "lookup_clothing", family: &LOOKUP, make: |dice| lookup(dice, 2, CATEGORIES[4].words, clothing_fact) },
    Task { name: "lookup_vehicles", family: &LOOKUP, make: |dice| lookup(dice, 2, CATEGORIES[3].words, colour_fact) },
    Task { name: "choice_animal", family: &CHOICE, make: |dice| choice(dice, CATEGORIES[0]) },
    Task { name: "choice_fruit", family: &CHOICE, make: |dice| choice(dice, CATEGORIES[1]) },
    Task { name: "choice_tool", family: &CHOICE, make: |dice| choice(dice, CATEGORIES[2]) },
    Task { name: "choice_vehicle", family: &CHOICE, make: |dice| choice(dice, CATEGORIES[3]) },
    Task { name: "choice_clothing", family: &CHOICE, make: |dice| choice(dice, CATEGORIES[4]) },
    Task { name: "odd_one_out", family: &ODD_ONE_OUT, make: odd_one_out },
    Task { name: "category_word", family: &CATEGORY, make: |dice| category(dice, str::to_owned) },
    Task { name: "category_sentence", family: &CATEGORY, make: |dice| category(dice, |word| format!("the {word} that I saw")) },
    Task { name: "membership_animal", family: &MEMBERSHIP, make: |dice| membership(dice, CATEGORIES[0]) },
    Task { name: "membership_fruit", family: &MEMBERSHIP, make: |dice| membership(dice, CATEGORIES[1]) },
    Task { name: "membership_furniture", family: &MEMBERSHIP, make: |dice| membership(dice, CATEGORIES[5]) },
    Task { name: "comparison_larger", family: &COMPARISON, make: |dice| comparison(dice, true) },
    Task { name: "comparison_smaller", family: &COMPARISON, make: |dice| comparison(dice, false) },
    Task { name: "threshold_five", family: &THRESHOLD, make: threshold },
    Task { name: "parity", family: &PARITY, make: parity },
    Task { name: "opposite_word", family: &OPPOSITE, make: |dice| opposite(dice, str::to_owned) },
    Task { name: "opposite_sentence", family: &OPPOSITE, make: |dice| opposite(dice, |word| format!("very {word}")) },
    Task { name: "same_or_different", family: &SAME, make: same },
    Task { name: "letter_order", family: &LETTER_ORDER, make: letter_order },
];

fn colour_fact(thing: &str, colour: &str) -> String {
    format!("The {thing} is {colour}.")
}

fn clothing_fact(thing: &str, colour: &str) -> String {
    format!("I wear a {colour} {thing}.")
}

static SENTIMENT: Family = Family {
    name: "sentiment",
    templates: &[
        "Review: {text}\nIs this review positive or negative?",
        "{text}\nIs this opinion of the {thing} positive or negative?",
        "Read this {thing} review. {text}\nWas it positive or negative?",
        "Is this review positive or negative? {text}",
    ],
    held_out: &["{text}\nIs this {thing} review positive or negative?", "Read this review. {text}\nIs it positive or negative?"],
};

static ENTAILMENT: Family = Family {
    name: "entailment",
    templates: &[
        "Premise: {premise}\nHypothesis: {hypothesis}. Does it follow? yes, no or maybe",
        "{premise}\nIs it true that {hypothesis}? yes, no or maybe",
        "{premise}\nCan we say that {hypothesis}? yes, no or maybe",
        "Is it true that {hypothesis}? {premise} yes, no or maybe",
    ],
    held_out: &["{premise}\nDoes it follow that {hypothesis}? yes, no or maybe"],
};

static ARITHMETIC: Family = Family {
    name: "arithmetic",
    templates: &["What is {expression}?", "Give the value of {expression}.", "Question: {expression} is what?", "Compute {expression}."],
    held_out: &["What is the value of {expression}?"],
};

static LOOKUP: Family = Family {
    name: "lookup",
    templates: &[
        "{facts}\nWhat colour is the {thing}?",
        "Facts: {facts}\nQuestion: what is the colour of the {thing}?",
        "{facts}\nGive the colour of the {thing}.",
        "{facts}\nWhich colour has the {thing}?",
    ],
    held_out: &["{facts}\nWhat is the colour of the {thing}?"],
};

static CHOICE: Family = Family {
    name: "choice",
    templates: &[
        "Which of these is {kind}?\nA: {a}\nB: {b}\nC: {c}\nD: {d}",
        "Choose {kind}.\nA: {a}\nB: {b}\nC: {c}\nD: {d}",
        "A: {a}\nB: {b}\nC: {c}\nD: {d}\nWhich of these is {kind}?",
        "Which letter is {kind}?\nA: {a}\nB: {b}\nC: {c}\nD: {d}",
    ],
    held_out: &["Choose which of these is {kind}.\nA: {a}\nB: {b}\nC: {c}\nD: {d}"],
};

static ODD_ONE_OUT: Family = Family {
    name: "odd_one_out",
    templates: &[
        "Which of these is different from the others?\nA: {a}\nB: {b}\nC: {c}\nD: {d}",
        "Choose the odd one out.\nA: {a}\nB: {b}\nC: {c}\nD: {d}",
        "A: {a}\nB: {b}\nC: {c}\nD: {d}\nWhich of these is the odd one out?",
        "Which letter is the odd one out?\nA: {a}\nB: {b}\nC: {c}\nD: {d}",
    ],
    held_out: &["Which of these is the odd one out?\nA: {a}\nB: {b}\nC: {c}\nD: {d}"],
};

static CATEGORY: Family = Family {
    name: "category",
    templates: &[
        "What kind of thing is {word}?",
        "Give the kind of thing: {word}",
        "Question: {word} is what kind of thing?",
        "Think of {word}. What kind of thing is it?",
    ],
    held_out: &["Which kind of thing is {word}?"],
};

static MEMBERSHIP: Family = Family {
    name: "membership",
    templates: &[
        "Is {word} {kind}? yes or no",
        "{word}: is it {kind}? yes or no",
        "Is it true that {word} is {kind}?",
        "Can we say that {word} is {kind}?",
    ],
    held_out: &["Does it follow that {word} is {kind}?"],
};

static COMPARISON: Family = Family {
    name: "comparison",
    templates: &[
        "Which number is {relation}, {first} or {second}?",
        "Give the {relation} number: {first} or {second}",
        "{first} or {second}: which number is {relation}?",
        "Choose the {relation} of {first} and {second}.",
    ],
    held_out: &["Which is the {relation} number, {first} or {second}?"],
};

static THRESHOLD: Family = Family {
    name: "threshold",
    templates: &[
        "Is {first} {relation} than five? yes or no",
        "{first}: is it {relation} than five?",
        "Is it true that {first} is {relation} than five?",
        "Can we say that {first} is {relation} than five?",
    ],
    held_out: &["Is the number {first} {relation} than five?"],
};

static PARITY: Family = Family {
    name: "parity",
    templates: &[
        "Is {number} even or odd?",
        "{number}: even or odd?",
        "Say whether {number} is even or odd.",
        "Question: is {number} odd or even?",
    ],
    held_out: &["Is the number {number} even or odd?"],
};

static OPPOSITE: Family = Family {
    name: "opposite",
    templates: &["What is the opposite of {word}?", "Give the opposite of {word}.", "The opposite of {word} is what?", "Opposite: {word}"],
    held_out: &["Which is the opposite of {word}?"],
};

static SAME: Family = Family {
    name: "same",
    templates: &[
        "Are {first} and {second} the same or different?",
        "{first} and {second}: same or different?",
        "Say whether {first} and {second} are the same or different.",
        "Same or different: {first}, {second}",
    ],
    held_out: &["Are the words {first} and {second} the same or different?"],
};

static LETTER_ORDER: Family = Family {
    name: "letter_order",
    templates: &[
        "Which letter comes {relation}, {first} or {second}?",
        "{first} or {second}: which letter comes {relation}?",
        "Give the letter that comes {relation}: {first} or {second}",
        "Choose the {relation} of the letters {first} and {second}.",
    ],
    held_out: &["Which of the letters comes {relation}, {first} or {second}?"],
};

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_table_is_as_promised() {
        let names: BTreeSet<_> = TASKS.iter().map(|task| task.name).collect();
        assert_eq!(names.len(), TASKS.len());
        assert!(names.len() >= 24);
        for task in &TASKS {
            assert!(task.family.templates.len() >= 4 && !task.family.held_out.is_empty(), "{}", task.family.name);
            assert!(task.family.templates.iter().all(|template| !task.family.held_out.contains(template)));
        }
    }

    #[test]
    fn instances_fill_every_place_of_every_template() {
        for task in &TASKS {
            for row in 0..200 {
                let instance = (task.make)(&mut Dice::training(5, row));
                assert!(!instance.answer.is_empty());
                let fields: BTreeSet<_> = instance.fields.iter().map(|(name, _)| format!("{{{name}}}")).collect();
                for template in task.family.templates.iter().chain(task.family.held_out) {
                    let rest = fields.iter().fold((*template).to_owned(), |text, place| text.replace(place, ""));
                    assert!(!rest.contains(['{', '}']), "{}: {template}", task.name);
                }
            }
        }
    }

    #[test]
    fn answers_are_right() {
        let field = |instance: &Instance, name: &str| instance.fields.iter().find(|(field, _)| *field == name).unwrap().1.clone();
        for row in 0..500 {
            let dice = &mut Dice::training(8, row);
            let sum = addition(dice);
            let terms: Vec<u32> = field(&sum, "expression").split(" plus ").map(|term| term.parse().unwrap()).collect();
            assert_eq!(sum.answer, terms.iter().sum::<u32>().to_string());
            let chosen = choice(dice, CATEGORIES[2]);
            let letter = chosen.answer.to_lowercase();
            for option in ["a", "b", "c", "d"] {
                assert_eq!(CATEGORIES[2].words.contains(&field(&chosen, option).as_str()), option == letter);
            }
            let looked_up = lookup(dice, 3, &OBJECTS, colour_fact);
            assert!(field(&looked_up, "facts").contains(&colour_fact(&field(&looked_up, "thing"), &looked_up.answer)));
            let compared = comparison(dice, true);
            let larger = field(&compared, "first").parse::<u32>().unwrap().max(field(&compared, "second").parse().unwrap());
            assert_eq!(compared.answer, larger.to_string());
        }
    }

    #[test]
    fn labels_of_the_evaluation_files_all_occur() {
        for file in &EVALUATION_FILES {
            let mut seen = BTreeSet::new();
            for task in TASKS.iter().filter(|task| task.family.name == file.family.name) {
                seen.extend((0..500).map(|row| (task.make)(&mut Dice::training(5, row)).answer));
            }
            assert!(file.labels.iter().all(|label| seen.contains(*label)), "{}: {seen:?}", file.name);
        }
    }
}
