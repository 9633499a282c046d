//! The page: markup, style and script become one document that needs nothing else.

use cloze_cluster::Secret;

/// Characters of a nonce; 128 bits in hexadecimal.
const NONCE_CHARACTERS: usize = 32;

const MARKUP: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// A document and what a browser may do with it.
pub(super) struct Page {
    /// The document.
    pub html: String,
    /// Its content security policy: its own style and script, requests to its own origin, and nothing else.
    pub policy: String,
}

/// Makes the page with a fresh nonce, so that a script that somehow got into the document would not run. Fails when the system's
/// random source cannot be read.
pub(super) fn page() -> anyhow::Result<Page> {
    let secret = Secret::random()?;
    let nonce = secret.expose().get(..NONCE_CHARACTERS).unwrap_or(secret.expose());
    let html = MARKUP.replace("{{nonce}}", nonce).replace("{{style}}", STYLE).replace("{{script}}", SCRIPT);
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    Ok(Page { html, policy })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_is_whole_and_needs_nothing_else() {
        let page = page().unwrap();
        assert!(!page.html.contains("{{"), "every place is filled");
        for part in [STYLE, SCRIPT] {
            assert!(page.html.contains(part));
        }
        for foreign in ["src=", "@import", "url(", "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("] {
            assert!(!page.html.contains(foreign), "{foreign}");
        }
        // The names of XML vocabularies look like addresses and are not loaded.
        let addresses = page.html.matches("http").count();
        assert_eq!(addresses, page.html.matches("http://www.w3.org/2000/svg").count());
    }

    #[test]
    fn a_nonce_is_used_once() {
        let [first, second] = [page().unwrap(), page().unwrap()];
        assert_ne!(first.policy, second.policy);
        let nonce = first.policy.split("'nonce-").nth(1).and_then(|rest| rest.split('\'').next()).unwrap();
        assert_eq!(nonce.len(), NONCE_CHARACTERS);
        assert_eq!(first.html.matches(&format!("nonce=\"{nonce}\"")).count(), 2, "style and script");
        assert!(!second.html.contains(nonce));
    }
}
