//! Word lists of the generated tasks. Short and common, so that a vocabulary of about a thousand pieces covers them.

/// Words of one category, with the category's name.
#[derive(Clone, Copy)]
pub(crate) struct Category {
    /// The name, one word; also an answer.
    pub(crate) name: &'static str,
    /// The name with its article, as it stands in a question.
    pub(crate) phrase: &'static str,
    /// The words, each in this category alone.
    pub(crate) words: &'static [&'static str],
}

pub(crate) const CATEGORIES: [Category; 6] = [
    Category {
        name: "animal",
        phrase: "an animal",
        words: &["dog", "cat", "horse", "cow", "sheep", "goat", "lion", "tiger", "bear", "mouse"],
    },
    Category {
        name: "fruit",
        phrase: "a fruit",
        words: &["apple", "pear", "plum", "cherry", "grape", "lemon", "melon", "peach", "banana", "mango"],
    },
    Category {
        name: "tool",
        phrase: "a tool",
        words: &["hammer", "saw", "drill", "wrench", "shovel", "rake", "axe", "file", "clamp", "ladder"],
    },
    Category {
        name: "vehicle",
        phrase: "a vehicle",
        words: &["car", "bus", "train", "truck", "boat", "ship", "tram", "plane", "van", "bike"],
    },
    Category {
        name: "clothing",
        phrase: "a piece of clothing",
        words: &["hat", "coat", "shirt", "scarf", "dress", "shoe", "sock", "glove", "jacket", "belt"],
    },
    Category {
        name: "furniture",
        phrase: "a piece of furniture",
        words: &["chair", "table", "sofa", "bed", "desk", "shelf", "bench", "stool", "couch", "wardrobe"],
    },
];

pub(crate) const COLOURS: [&str; 8] = ["red", "blue", "green", "yellow", "black", "white", "brown", "pink"];

pub(crate) const OBJECTS: [&str; 10] = ["box", "door", "cup", "lamp", "book", "ball", "bag", "wall", "bottle", "kite"];

pub(crate) const NAMES: [&str; 10] = ["Tom", "Anna", "Ben", "Clara", "David", "Emma", "Jack", "Lucy", "Peter", "Sarah"];

pub(crate) const PLACES: [&str; 8] = ["garden", "kitchen", "park", "office", "school", "library", "market", "station"];

pub(crate) const ACTIVITIES: [&str; 8] = ["reading", "cooking", "running", "sleeping", "singing", "working", "swimming", "painting"];

pub(crate) const DAYS: [&str; 5] = ["Monday", "Tuesday", "Thursday", "Friday", "Sunday"];

/// Words of praise.
pub(crate) const POSITIVE: Polarity = Polarity {
    label: "positive",
    adjectives: &["great", "wonderful", "lovely", "excellent", "superb", "brilliant", "perfect", "amazing", "pleasant", "delightful"],
    verbs: &["loved", "enjoyed", "liked", "adored"],
};

/// Words of blame.
pub(crate) const NEGATIVE: Polarity = Polarity {
    label: "negative",
    adjectives: &["bad", "awful", "terrible", "horrible", "boring", "dreadful", "poor", "ugly", "dirty", "disappointing"],
    verbs: &["hated", "disliked", "regretted", "despised"],
};

/// What a review of one polarity is made of.
#[derive(Clone, Copy)]
pub(crate) struct Polarity {
    /// The answer.
    pub(crate) label: &'static str,
    /// Words for the thing reviewed.
    pub(crate) adjectives: &'static [&'static str],
    /// What the writer did to it.
    pub(crate) verbs: &'static [&'static str],
}

pub(crate) const FILM_PARTS: [&str; 5] = ["film", "story", "music", "acting", "ending"];

pub(crate) const RESTAURANT_PARTS: [&str; 5] = ["food", "service", "soup", "dessert", "waiter"];

pub(crate) const PHONE_PARTS: [&str; 5] = ["screen", "camera", "battery", "sound", "phone"];

pub(crate) const HOTEL_PARTS: [&str; 5] = ["room", "breakfast", "view", "pool", "staff"];

pub(crate) const OPPOSITES: [(&str, &str); 10] = [
    ("hot", "cold"),
    ("big", "small"),
    ("up", "down"),
    ("long", "short"),
    ("open", "closed"),
    ("fast", "slow"),
    ("old", "new"),
    ("full", "empty"),
    ("light", "dark"),
    ("wet", "dry"),
];

pub(crate) const LETTERS: [&str; 8] = ["A", "B", "C", "D", "E", "F", "G", "H"];

pub(crate) const DIGITS: [&str; 10] = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"];

pub(crate) const NUMBER_WORDS: [&str; 10] = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"];

/// Every word that must be one token after the anchor.
pub(crate) fn answer_words() -> Vec<&'static str> {
    let mut words = vec!["yes", "no", "maybe", "positive", "negative", "even", "odd", "same", "different"];
    words.extend(LETTERS);
    words.extend(DIGITS);
    words.extend(COLOURS);
    words.extend(CATEGORIES.map(|category| category.name));
    words
}
