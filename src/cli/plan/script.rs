//! The batch script that a plan shows.

use cloze_recipes::failure::Failure;

use super::Wanted;

/// The script of the run's first job; `None` where there is no batch system.
pub(super) fn script(_wanted: &Wanted<'_>) -> Result<Option<String>, Failure> {
    Ok(None)
}
