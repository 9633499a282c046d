//! A recipe that a run folder keeps, read back to be shown and compared.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;

use crate::failure::{Failure, FailureKind};
use crate::tree::{self, MAX_RECIPE_BYTES, Origin};

/// Reads what [`Recipe::to_yaml`](crate::recipe::Recipe::to_yaml) wrote, as JSON, neither composed nor checked again, so that recipes of
/// any version can be read, and a thousand of them in a moment. Keys without a value are left out. Fails with kind `Recipe` on a file
/// that is missing, too large or no YAML.
pub fn read_rendered(path: &Path) -> Result<serde_json::Value, Failure> {
    let unreadable = |error: std::io::Error| Failure::new(FailureKind::Recipe, "cannot read the recipe").at(path.display()).because(error);
    let mut text = String::new();
    File::open(path).and_then(|file| file.take(MAX_RECIPE_BYTES as u64 + 1).read_to_string(&mut text)).map_err(unreadable)?;
    if text.len() > MAX_RECIPE_BYTES {
        let failure = Failure::new(FailureKind::Recipe, "the recipe is too large").at(path.display());
        return Err(failure.expected(format!("at most {MAX_RECIPE_BYTES} bytes")));
    }
    let folder = path.parent().unwrap_or(Path::new(".")).to_path_buf();
    let origin = Arc::new(Origin::File { shown: path.display().to_string(), folder });
    let root = tree::parse(&text, &origin)
        .map_err(|error| Failure::new(FailureKind::Recipe, "cannot read the recipe as YAML").at(error.place).because(error.message))?;
    Ok(root.json())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;

    #[test]
    fn a_recipe_is_read_as_it_stands() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("recipe.yaml");
        fs::write(&path, "version: 1\nname: demo\nmodel: {preset: tiny, tokenizer: t}\nextends: other.yaml\nlist: [1.5, x]\n").unwrap();
        let found = read_rendered(&path).unwrap();
        assert_eq!(
            (&found["extends"], &found["model"]["preset"], &found["list"]),
            (&json!("other.yaml"), &json!("tiny"), &json!([1.5, "x"]))
        );
        fs::write(&path, "a: [1").unwrap();
        assert_eq!(read_rendered(&path).unwrap_err().what, "cannot read the recipe as YAML");
        fs::write(&path, "#".repeat(MAX_RECIPE_BYTES + 1)).unwrap();
        assert_eq!(read_rendered(&path).unwrap_err().what, "the recipe is too large");
        assert_eq!(read_rendered(&folder.path().join("none")).unwrap_err().kind, FailureKind::Recipe);
    }
}
