//! Opens a folder or a bucket from a url and options.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use cloze_recipes::failure::{Failure, FailureKind};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::local::LocalFileSystem;
use object_store::path::Path as ObjectPath;
use object_store::{BackoffConfig, ClientConfigKey, ObjectStore, RetryConfig};
use url::Url;

/// A connection that is not up after this long is given up (and tried again).
const CONNECT_TIMEOUT_SECONDS: u64 = 5;
/// One request, body included, takes at most this long; large objects are read and written in pieces.
const REQUEST_TIMEOUT_SECONDS: u64 = 30;
/// A request is sent again at most this often.
const MAX_RETRIES: usize = 5;
/// No retry starts later than this after the first attempt, so that an outage is reported within a minute and a half.
const RETRY_TIMEOUT_MINUTES: u64 = 1;
/// Waits between attempts start here and double.
const FIRST_BACKOFF_MS: u64 = 100;
/// Longest wait between two attempts.
const MAX_BACKOFF_SECONDS: u64 = 10;

/// A folder or a bucket prefix.
#[derive(Clone, Debug)]
pub struct Store {
    /// The store that holds the objects.
    pub object_store: Arc<dyn ObjectStore>,
    /// Every key is below this path; it can also name a single object.
    pub prefix: ObjectPath,
    /// Where this is, for people: a path or `s3://bucket/prefix`, without a slash at the end.
    pub display_url: String,
    local: bool,
}

impl Store {
    /// Full path of a key; the empty key is the prefix itself. A key with `.`, `..` or empty parts is a failure.
    pub fn path(&self, key: &str) -> Result<ObjectPath, Failure> {
        if key.is_empty() {
            return Ok(self.prefix.clone());
        }
        let full = if self.prefix.as_ref().is_empty() { key.to_owned() } else { format!("{}/{key}", self.prefix) };
        ObjectPath::parse(full)
            .map_err(|error| Failure::new(FailureKind::Storage, "not a usable object name").at(self.url(key)).because(error))
    }

    /// Where a key is, for people.
    pub fn url(&self, key: &str) -> String {
        if key.is_empty() { self.display_url.clone() } else { format!("{}/{key}", self.display_url) }
    }

    /// Whether the objects are files of this machine; then [`Store::url`] is their path.
    pub fn is_local(&self) -> bool {
        self.local
    }
}

/// Opens a plain path, `file:///path` or `s3://bucket/prefix`; nothing is read or created yet.
///
/// `s3://` takes its settings from the `AWS_*` environment and then from `options` by their usual names (`endpoint`, `region`,
/// `allow_http`). Fails on an unknown scheme or option, and on secrets in `options`.
pub fn open(url: &str, options: &BTreeMap<String, String>) -> anyhow::Result<Store> {
    match Url::parse(url) {
        Ok(parsed) if parsed.scheme() == "file" => {
            let path = parsed.to_file_path().map_err(|()| bad_url(url, "a path of this machine", "write `file:///absolute/path`"))?;
            open_local(&path)
        }
        Ok(parsed) if parsed.scheme() == "s3" => open_s3(url, &parsed, options),
        Ok(parsed) if url.contains("://") => {
            let hint = format!("`{}://` is not supported; copy the data to one that is", parsed.scheme());
            Err(bad_url(url, "a path, `file://` or `s3://`", &hint).into())
        }
        _ => open_local(Path::new(url)),
    }
}

fn open_local(path: &Path) -> anyhow::Result<Store> {
    let absolute =
        std::path::absolute(path).map_err(|error| bad_url(&path.display().to_string(), "a path", "check the path").because(error))?;
    let absolute = without_dots(&absolute);
    let prefix = ObjectPath::from_absolute_path(&absolute)
        .map_err(|error| bad_url(&absolute.display().to_string(), "a path in UTF-8", "rename it").because(error))?;
    Ok(Store {
        object_store: Arc::new(LocalFileSystem::new().with_fsync(true)),
        prefix,
        display_url: absolute.display().to_string(),
        local: true,
    })
}

/// Resolves `.` and `..` by name, since object paths have neither.
fn without_dots(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                plain.pop();
            }
            other => plain.push(other),
        }
    }
    plain
}

fn open_s3(url: &str, parsed: &Url, options: &BTreeMap<String, String>) -> anyhow::Result<Store> {
    let bucket =
        parsed.host_str().filter(|bucket| !bucket.is_empty()).ok_or_else(|| bad_url(url, "`s3://bucket/prefix`", "name the bucket"))?;
    let prefix = ObjectPath::from_url_path(parsed.path())
        .map_err(|error| bad_url(url, "`s3://bucket/prefix`", "check the prefix").because(error))?;
    // The TLS library is built without a default provider of cryptography; a second call finds it installed, which is fine.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = AmazonS3Builder::from_env()
        .with_retry(retry_config())
        .with_config(AmazonS3ConfigKey::Client(ClientConfigKey::ConnectTimeout), format!("{CONNECT_TIMEOUT_SECONDS} seconds"))
        .with_config(AmazonS3ConfigKey::Client(ClientConfigKey::Timeout), format!("{REQUEST_TIMEOUT_SECONDS} seconds"));
    for (name, value) in options {
        builder = builder.with_config(option_key(url, name)?, value);
    }
    let builder = builder.with_bucket_name(bucket);
    check_plain_http(url, &builder)?;
    let store = builder.build().map_err(|error| {
        Failure::new(FailureKind::Storage, "bucket settings are not usable")
            .at(url)
            .because(super::failure::with_causes(&error))
            .hint("check the source's `options` and the `AWS_*` environment variables")
    })?;
    let display_url = format!("s3://{bucket}/{prefix}").trim_end_matches('/').to_owned();
    Ok(Store { object_store: Arc::new(store), prefix, display_url, local: false })
}

fn retry_config() -> RetryConfig {
    let backoff = BackoffConfig {
        init_backoff: Duration::from_millis(FIRST_BACKOFF_MS),
        max_backoff: Duration::from_secs(MAX_BACKOFF_SECONDS),
        base: 2.0,
    };
    RetryConfig { backoff, max_retries: MAX_RETRIES, retry_timeout: Duration::from_mins(RETRY_TIMEOUT_MINUTES) }
}

/// An option's key. Secrets are refused because recipes are copied into run folders and shown.
fn option_key(url: &str, name: &str) -> Result<AmazonS3ConfigKey, Failure> {
    let key = AmazonS3ConfigKey::from_str(&name.to_ascii_lowercase()).map_err(|_| {
        Failure::new(FailureKind::Recipe, format!("unknown object store option `{name}`"))
            .at(url)
            .expected("an option such as `endpoint`, `region`, `allow_http`, `virtual_hosted_style_request`, `skip_signature`")
            .hint("remove it or correct its name")
    })?;
    if matches!(key, AmazonS3ConfigKey::SecretAccessKey | AmazonS3ConfigKey::Token) || name.to_ascii_lowercase().contains("customer_key") {
        return Err(Failure::new(FailureKind::Recipe, format!("object store option `{name}` is a secret"))
            .at(url)
            .hint("set `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` and `AWS_SESSION_TOKEN` in the environment instead"));
    }
    Ok(key)
}

/// Without this check an `http://` endpoint fails on the first request with a message about a builder.
fn check_plain_http(url: &str, builder: &AmazonS3Builder) -> Result<(), Failure> {
    let allowed = builder.get_config_value(&AmazonS3ConfigKey::Client(ClientConfigKey::AllowHttp)).unwrap_or_default().to_ascii_lowercase();
    let allowed = ["1", "true", "on", "yes", "y"].contains(&allowed.as_str());
    let endpoint =
        builder.get_config_value(&AmazonS3ConfigKey::S3Endpoint).or_else(|| builder.get_config_value(&AmazonS3ConfigKey::Endpoint));
    match endpoint {
        Some(endpoint) if endpoint.starts_with("http://") && !allowed => {
            Err(Failure::new(FailureKind::Recipe, "endpoint without encryption is not allowed")
                .at(url)
                .expected("an `https://` endpoint, or the option `allow_http: \"true\"`")
                .found(endpoint)
                .hint("set `allow_http` only on a network that you trust"))
        }
        _ => Ok(()),
    }
}

fn bad_url(url: &str, expected: &str, hint: &str) -> Failure {
    Failure::new(FailureKind::Recipe, "not a usable location").at(url).expected(expected).hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn failure(url: &str, pairs: &[(&str, &str)]) -> Failure {
        open(url, &options(pairs)).unwrap_err().downcast::<Failure>().unwrap()
    }

    #[test]
    fn urls_and_paths_name_the_same_folder() {
        let cases = ["file:///data/a%20b", "/data/a b", "/data/x/../a b", "/data/./a b/"];
        for url in cases {
            let store = open(url, &BTreeMap::new()).unwrap();
            assert_eq!(store.display_url.trim_end_matches('/'), "/data/a b", "{url}");
            assert_eq!(store.path("k.jsonl").unwrap().as_ref(), "data/a b/k.jsonl", "{url}");
            assert!(store.is_local());
        }
    }

    #[test]
    fn a_bucket_url_splits_into_bucket_and_prefix() {
        let store = open("s3://corpus/flan/v2/", &options(&[("region", "eu-west-1")])).unwrap();
        assert_eq!(store.prefix.as_ref(), "flan/v2");
        assert_eq!(store.url("a.jsonl"), "s3://corpus/flan/v2/a.jsonl");
        assert!(!store.is_local());
    }

    #[test]
    fn unusable_locations_are_recipe_failures() {
        let cases: [(&str, &[(&str, &str)], &str); 5] = [
            ("gs://bucket/x", &[], "not a usable location"),
            ("file://host/x", &[], "not a usable location"),
            ("s3://bucket/x", &[("regoin", "x")], "unknown object store option `regoin`"),
            ("s3://bucket/x", &[("secret_access_key", "hush")], "object store option `secret_access_key` is a secret"),
            ("s3://bucket/x", &[("endpoint", "http://127.0.0.1:9")], "endpoint without encryption is not allowed"),
        ];
        for (url, pairs, what) in cases {
            let failure = failure(url, pairs);
            assert_eq!(failure.kind, FailureKind::Recipe, "{url}");
            assert_eq!(failure.what, what, "{url}");
            assert!(!failure.to_string().contains("hush"));
        }
    }

    #[test]
    fn keys_cannot_leave_the_prefix() {
        let store = open("/data", &BTreeMap::new()).unwrap();
        assert!(store.path("../other").is_err());
        assert_eq!(store.path("").unwrap(), store.prefix);
    }
}
