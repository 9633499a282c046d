//! The environment variables by which workers are given what must not show in a list of processes.

use std::env::{VarError, var};

use cloze_recipes::failure::{Failure, FailureKind};

/// The run's token.
pub const TOKEN_VARIABLE: &str = "CLOZE_TOKEN";

/// The key by which a worker knows its coordinator, where they speak by TLS.
pub const COORDINATOR_KEY_VARIABLE: &str = "CLOZE_COORDINATOR_KEY";

/// Reads one of them; `None` where it is not set. Fails with kind `Recipe` where it is no text: to go on without it would end in a failure
/// that blames something else.
pub fn given(variable: &str) -> Result<Option<String>, Failure> {
    read(variable, var(variable))
}

fn read(variable: &str, value: Result<String, VarError>) -> Result<Option<String>, Failure> {
    match value {
        Ok(text) => Ok(Some(text)),
        Err(VarError::NotPresent) => Ok(None),
        Err(VarError::NotUnicode(_)) => Err(Failure::new(FailureKind::Recipe, format!("the environment variable {variable} is no text"))
            .expected("the value that control.json of the run has")
            .hint("set it again, or unset it")),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt as _;

    use super::*;

    #[test]
    fn a_variable_is_there_or_not_or_wrong() {
        assert_eq!(read("V", Ok("text".to_owned())).unwrap().as_deref(), Some("text"));
        assert_eq!(read("V", Err(VarError::NotPresent)).unwrap(), None);
        let failure = read("V", Err(VarError::NotUnicode(OsString::from_vec(vec![0xff])))).unwrap_err();
        assert!(failure.kind == FailureKind::Recipe && failure.what.contains('V'), "{failure}");
    }
}
