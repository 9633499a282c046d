//! Splits a stream into chunks of whole lines, in bounded memory.

use std::io::{self, BufRead, Read};

use cloze_recipes::failure::{Failure, FailureKind};

/// A longer line is refused: it is far beyond any record, and most likely not a jsonl file.
pub(super) const MAX_LINE_BYTES: usize = 16 << 20;
/// A chunk is closed once it has this many bytes; about a thousand records of instruction data.
const CHUNK_BYTES: usize = 1 << 20;
/// A chunk is closed at the latest after this many lines.
const CHUNK_LINES: usize = 4096;
/// Some editors write this at the start of a file.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Some lines of a file.
#[derive(Clone, Debug, Default)]
pub(super) struct Lines {
    /// 1-based number of the first line.
    first: u64,
    text: Vec<u8>,
    ends: Vec<usize>,
}

impl Lines {
    /// Number and bytes of every line that is not blank, without its line break.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        let lines = starts.zip(&self.ends).map(|(start, end)| self.text[start..*end].trim_ascii());
        (self.first..).zip(lines).filter(|(_, line)| !line.is_empty())
    }
}

/// Reads lines from a decoded stream.
pub(super) struct LineReader<R> {
    stream: R,
    url: String,
    next_line: u64,
}

impl<R: BufRead> LineReader<R> {
    pub(super) fn new(stream: R, url: &str) -> Self {
        Self { stream, url: url.to_owned(), next_line: 1 }
    }

    /// The next lines; `None` at the end of the file.
    pub(super) fn next_lines(&mut self) -> anyhow::Result<Option<Lines>> {
        let mut lines = Lines { first: self.next_line, ..Lines::default() };
        while lines.text.len() < CHUNK_BYTES && lines.ends.len() < CHUNK_LINES {
            let before = lines.text.len();
            let limit = MAX_LINE_BYTES as u64 + 1;
            self.stream.by_ref().take(limit).read_until(b'\n', &mut lines.text).map_err(|error| self.broken(error))?;
            let num_bytes = lines.text.len() - before;
            if num_bytes == 0 {
                break;
            }
            if num_bytes > MAX_LINE_BYTES {
                return Err(self.too_long().into());
            }
            if self.next_line == 1 && lines.text.starts_with(BYTE_ORDER_MARK) {
                lines.text.drain(..BYTE_ORDER_MARK.len());
            }
            lines.ends.push(lines.text.len());
            self.next_line += 1;
        }
        Ok((!lines.ends.is_empty()).then_some(lines))
    }

    fn place(&self) -> String {
        format!("{}:{}", self.url, self.next_line)
    }

    fn broken(&self, error: io::Error) -> Failure {
        match error.downcast::<Failure>() {
            Ok(failure) => failure,
            Err(error) => Failure::new(FailureKind::Input, "input file is cut off or damaged")
                .at(self.place())
                .expected("a complete file in the format that its name says")
                .because(error)
                .hint("get the file again; finished files are kept, and the same command goes on"),
        }
    }

    fn too_long(&self) -> Failure {
        Failure::new(FailureKind::Input, "line is too long")
            .at(self.place())
            .expected(format!("at most {MAX_LINE_BYTES} bytes"))
            .hint("is this a jsonl file, with one record a line?")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all_lines(content: &[u8]) -> Vec<(u64, Vec<u8>)> {
        let mut reader = LineReader::new(content, "f");
        let mut found = Vec::new();
        while let Some(lines) = reader.next_lines().unwrap() {
            found.extend(lines.iter().map(|(number, line)| (number, line.to_vec())));
        }
        found
    }

    #[test]
    fn numbers_count_blank_lines_and_breaks_are_cut() {
        let found = all_lines(b"\xef\xbb\xbfa\r\n\n  \nb\n c ");
        assert_eq!(found, [(1, b"a".to_vec()), (4, b"b".to_vec()), (5, b"c".to_vec())]);
        assert!(all_lines(b"").is_empty());
    }

    #[test]
    fn a_line_beyond_the_bound_is_refused_with_its_number() {
        let mut content = b"ok\n".to_vec();
        content.resize(content.len() + MAX_LINE_BYTES + 1, b'x');
        let mut reader = LineReader::new(content.as_slice(), "f.jsonl");
        let failure = reader.next_lines().unwrap_err().downcast::<Failure>().unwrap();
        assert_eq!(failure.place.as_deref(), Some("f.jsonl:2"));
    }

    #[test]
    fn many_lines_come_in_several_chunks_with_running_numbers() {
        let content: String = (0..3 * CHUNK_LINES).map(|line| format!("{line}\n")).collect();
        let found = all_lines(content.as_bytes());
        assert_eq!(found.len(), 3 * CHUNK_LINES);
        assert!(found.iter().all(|(number, line)| line == (number - 1).to_string().as_bytes()));
    }

    proptest! {
        #[test]
        fn lines_are_those_of_the_text(lines in prop::collection::vec("[a-z ]{0,9}", 0..40)) {
            let expected: Vec<_> = (1..).zip(&lines).map(|(n, line)| (n, line.trim().as_bytes().to_vec()))
                .filter(|(_, line)| !line.is_empty()).collect();
            prop_assert_eq!(all_lines(lines.join("\n").as_bytes()), expected);
        }
    }
}
