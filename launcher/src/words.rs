//! Words that several texts share.

/// A number and what it counts, as in `1 trial` and `2 trials`.
pub fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// The verb to such a number.
pub fn is_or_are(count: usize) -> &'static str {
    if count == 1 { "is" } else { "are" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_no_plural() {
        let texts = [0, 1, 2].map(|count| format!("{} {} done", counted(count, "trial"), is_or_are(count)));
        assert_eq!(texts, ["0 trials are done", "1 trial is done", "2 trials are done"]);
    }
}
