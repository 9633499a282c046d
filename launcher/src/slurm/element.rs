//! Which element of an array of jobs this process is.

use cloze_recipes::failure::{Failure, FailureKind};

/// Environment variable with the number of the element.
const ELEMENT_VARIABLE: &str = "SLURM_ARRAY_TASK_ID";

/// Number of the element of the array that this process belongs to. Fails with kind `Environment` outside an array.
pub fn array_element() -> Result<u32, Failure> {
    parse(std::env::var(ELEMENT_VARIABLE).ok().as_deref())
}

fn parse(text: Option<&str>) -> Result<u32, Failure> {
    let number = text.and_then(|text| text.parse().ok());
    number.ok_or_else(|| {
        Failure::new(FailureKind::Environment, "this process is no element of an array of jobs")
            .expected(format!("a number in {ELEMENT_VARIABLE}"))
            .found(text.unwrap_or("nothing"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_element_is_a_number_of_the_environment() {
        assert_eq!(parse(Some("7")).unwrap(), 7);
        assert_eq!(parse(None).unwrap_err().found.as_deref(), Some("nothing"));
        assert_eq!(parse(Some("x")).unwrap_err().found.as_deref(), Some("x"));
    }
}
