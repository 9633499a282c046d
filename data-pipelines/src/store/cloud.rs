//! Buckets of S3, Google Cloud Storage and Azure: their settings, time limits and retries.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use cloze_recipes::failure::{Failure, FailureKind};
use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzure, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorage, GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::path::Path as ObjectPath;
use object_store::{BackoffConfig, ClientConfigKey, ObjectStore, RetryConfig};
use url::Url;

use super::Store;
use super::location::{StoreKind, bad_url};

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

/// Whose buckets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cloud {
    /// S3 and what speaks its protocol.
    S3,
    /// Google Cloud Storage.
    Google,
    /// Azure blob storage.
    Azure,
}

impl Cloud {
    /// The cloud of a url's scheme.
    pub(super) fn of_scheme(scheme: &str) -> Option<Self> {
        match scheme {
            "s3" => Some(Self::S3),
            "gs" => Some(Self::Google),
            "az" => Some(Self::Azure),
            _ => None,
        }
    }

    fn scheme(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Google => "gs",
            Self::Azure => "az",
        }
    }

    /// The usual options, for a message about one that is not known.
    fn known_options(self) -> &'static str {
        match self {
            Self::S3 => "`endpoint`, `region`, `allow_http`, `virtual_hosted_style_request`, `skip_signature`, `conditional_put`",
            Self::Google => "`base_url`, `allow_http`, `skip_signature`, `service_account`, `application_credentials`",
            Self::Azure => "`account_name`, `endpoint`, `allow_http`, `use_emulator`, `skip_signature`, `tenant_id`, `client_id`",
        }
    }

    /// Where secrets belong.
    fn secrets_hint(self) -> &'static str {
        match self {
            Self::S3 => "set `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` and `AWS_SESSION_TOKEN` in the environment instead",
            Self::Google => "set `GOOGLE_SERVICE_ACCOUNT` or `GOOGLE_APPLICATION_CREDENTIALS` in the environment to a file that holds it",
            Self::Azure => "set `AZURE_STORAGE_ACCOUNT_KEY`, `AZURE_STORAGE_SAS_TOKEN` or `AZURE_CLIENT_SECRET` in the environment instead",
        }
    }

    /// What helps when a store refuses; without credentials in the environment it asks the cloud's metadata service, which refuses too.
    pub(super) fn refused_hint(self) -> &'static str {
        match self {
            Self::S3 => {
                "check the permissions, and for a bucket that `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY` are set in the environment \
                 and right"
            }
            Self::Google => {
                "check the permissions, and that `GOOGLE_APPLICATION_CREDENTIALS` or `GOOGLE_SERVICE_ACCOUNT` is set in the environment \
                 and right"
            }
            Self::Azure => {
                "check the permissions, and that `AZURE_STORAGE_ACCOUNT_NAME` and `AZURE_STORAGE_ACCOUNT_KEY` are set in the environment \
                 and right"
            }
        }
    }
}

/// Opens the bucket of a url, which has been parsed already.
pub(super) fn open_bucket(cloud: Cloud, url: &str, parsed: &Url, options: &BTreeMap<String, String>) -> anyhow::Result<Store> {
    let shape = format!("`{}://bucket/prefix`", cloud.scheme());
    let has_user = !parsed.username().is_empty() || parsed.password().is_some();
    if has_user || parsed.port().is_some() || parsed.query().is_some() || parsed.fragment().is_some() {
        // What stands there may be a secret, so the url is not shown.
        let shown = format!("{}://…", cloud.scheme());
        return Err(bad_url(&shown, &shape, "leave out user, port and query; secrets come from the environment").into());
    }
    let bucket = parsed.host_str().filter(|bucket| !bucket.is_empty()).ok_or_else(|| bad_url(url, &shape, "name the bucket"))?;
    let prefix = ObjectPath::from_url_path(parsed.path()).map_err(|error| bad_url(url, &shape, "check the prefix").because(error))?;
    // The TLS library is built without a default provider of cryptography; a second call finds it installed, which is fine.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let object_store: Arc<dyn ObjectStore> = match cloud {
        Cloud::S3 => Arc::new(s3(url, bucket, options)?),
        Cloud::Google => Arc::new(google(url, bucket, options)?),
        Cloud::Azure => Arc::new(azure(url, bucket, options)?),
    };
    let display_url = format!("{}://{bucket}/{prefix}", cloud.scheme()).trim_end_matches('/').to_owned();
    Ok(Store { object_store, prefix, display_url, kind: StoreKind::Bucket(cloud) })
}

fn s3(url: &str, bucket: &str, options: &BTreeMap<String, String>) -> Result<AmazonS3, Failure> {
    let is_secret = |key: &AmazonS3ConfigKey, name: &str| {
        matches!(key, AmazonS3ConfigKey::SecretAccessKey | AmazonS3ConfigKey::Token) || name.contains("customer_key")
    };
    let mut builder = AmazonS3Builder::from_env().with_retry(retry_config());
    for (key, value) in time_limits() {
        builder = builder.with_config(AmazonS3ConfigKey::Client(key), value);
    }
    for (name, value) in options {
        builder = builder.with_config(option_key(Cloud::S3, url, name, is_secret)?, value);
    }
    let builder = builder.with_bucket_name(bucket);
    let endpoint =
        builder.get_config_value(&AmazonS3ConfigKey::S3Endpoint).or_else(|| builder.get_config_value(&AmazonS3ConfigKey::Endpoint));
    check_plain_http(url, endpoint, builder.get_config_value(&AmazonS3ConfigKey::Client(ClientConfigKey::AllowHttp)))?;
    builder.build().map_err(|error| unusable(url, &error))
}

fn google(url: &str, bucket: &str, options: &BTreeMap<String, String>) -> Result<GoogleCloudStorage, Failure> {
    let is_secret = |key: &GoogleConfigKey, _: &str| matches!(key, GoogleConfigKey::ServiceAccountKey | GoogleConfigKey::BearerToken);
    // The builder would allow it by itself.
    let allow_http = GoogleConfigKey::Client(ClientConfigKey::AllowHttp);
    let mut builder = GoogleCloudStorageBuilder::from_env().with_retry(retry_config()).with_config(allow_http, "false");
    for (key, value) in time_limits() {
        builder = builder.with_config(GoogleConfigKey::Client(key), value);
    }
    for (name, value) in options {
        builder = builder.with_config(option_key(Cloud::Google, url, name, is_secret)?, value);
    }
    let builder = builder.with_bucket_name(bucket);
    let endpoint = builder.get_config_value(&GoogleConfigKey::BaseUrl);
    check_plain_http(url, endpoint, builder.get_config_value(&GoogleConfigKey::Client(ClientConfigKey::AllowHttp)))?;
    builder.build().map_err(|error| unusable(url, &error))
}

fn azure(url: &str, container: &str, options: &BTreeMap<String, String>) -> Result<MicrosoftAzure, Failure> {
    let is_secret = |key: &AzureConfigKey, _: &str| {
        matches!(
            key,
            AzureConfigKey::AccessKey
                | AzureConfigKey::ClientSecret
                | AzureConfigKey::SasKey
                | AzureConfigKey::Token
                | AzureConfigKey::FabricSessionToken
                | AzureConfigKey::EncryptionKey
        )
    };
    let mut builder = MicrosoftAzureBuilder::from_env().with_retry(retry_config());
    for (key, value) in time_limits() {
        builder = builder.with_config(AzureConfigKey::Client(key), value);
    }
    for (name, value) in options {
        builder = builder.with_config(option_key(Cloud::Azure, url, name, is_secret)?, value);
    }
    let builder = builder.with_container_name(container);
    // An emulator has its own address, from `AZURITE_BLOB_STORAGE_URL`, and is spoken to without encryption.
    let endpoint = builder.get_config_value(&AzureConfigKey::Endpoint);
    check_plain_http(url, endpoint, builder.get_config_value(&AzureConfigKey::Client(ClientConfigKey::AllowHttp)))?;
    builder.build().map_err(|error| unusable(url, &error))
}

fn time_limits() -> [(ClientConfigKey, String); 2] {
    [
        (ClientConfigKey::ConnectTimeout, format!("{CONNECT_TIMEOUT_SECONDS} seconds")),
        (ClientConfigKey::Timeout, format!("{REQUEST_TIMEOUT_SECONDS} seconds")),
    ]
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
fn option_key<K: FromStr>(cloud: Cloud, url: &str, name: &str, is_secret: impl Fn(&K, &str) -> bool) -> Result<K, Failure> {
    let lowercase = name.to_ascii_lowercase();
    let key = K::from_str(&lowercase).map_err(|_| {
        Failure::new(FailureKind::Recipe, format!("unknown object store option `{name}`"))
            .at(url)
            .expected(format!("an option such as {}", cloud.known_options()))
            .hint("remove it or correct its name")
    })?;
    if is_secret(&key, &lowercase) {
        return Err(Failure::new(FailureKind::Recipe, format!("object store option `{name}` is a secret"))
            .at(url)
            .hint(cloud.secrets_hint()));
    }
    Ok(key)
}

/// Without this check an `http://` endpoint fails on the first request with a message about a builder.
fn check_plain_http(url: &str, endpoint: Option<String>, allowed: Option<String>) -> Result<(), Failure> {
    let allowed = ["1", "true", "on", "yes", "y"].contains(&allowed.unwrap_or_default().to_ascii_lowercase().as_str());
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

fn unusable(url: &str, error: &object_store::Error) -> Failure {
    Failure::new(FailureKind::Storage, "bucket settings are not usable")
        .at(url)
        .because(super::failure::with_causes(error))
        .hint("check the `options` of this location and the `AWS_*`, `GOOGLE_*` or `AZURE_*` environment variables")
}

#[cfg(test)]
mod tests {
    use super::super::open;
    use super::*;

    fn options(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_bucket_url_splits_into_bucket_and_prefix() {
        let cases: [(&str, &[(&str, &str)]); 4] = [
            ("s3://corpus/flan/v2/", &[("region", "eu-west-1")]),
            ("gs://corpus/flan/v2", &[("skip_signature", "true"), ("base_url", "http://127.0.0.1:4443"), ("allow_http", "true")]),
            ("az://corpus/flan/v2", &[("use_emulator", "true")]),
            ("az://corpus/flan/v2/", &[("account_name", "acme"), ("skip_signature", "true"), ("endpoint", "https://acme.example")]),
        ];
        for (url, pairs) in cases {
            let store = open(url, &options(pairs)).unwrap();
            let scheme = url.split("://").next().unwrap();
            assert_eq!(store.prefix.as_ref(), "flan/v2", "{url}");
            assert_eq!(store.url("a.jsonl"), format!("{scheme}://corpus/flan/v2/a.jsonl"));
            assert!(!store.is_local());
        }
    }

    #[test]
    fn unusable_options_are_recipe_failures() {
        let cases: [(&str, &[(&str, &str)], &str); 12] = [
            ("s3://key:hush@bucket/x", &[], "not a usable location"),
            ("az://container/x?sig=hush", &[], "not a usable location"),
            ("s3://bucket/x", &[("regoin", "x")], "unknown object store option `regoin`"),
            ("gs://bucket/x", &[("region", "x")], "unknown object store option `region`"),
            ("az://bucket/x", &[("region", "x")], "unknown object store option `region`"),
            ("s3://bucket/x", &[("secret_access_key", "hush")], "object store option `secret_access_key` is a secret"),
            ("gs://bucket/x", &[("service_account_key", "hush")], "object store option `service_account_key` is a secret"),
            ("gs://bucket/x", &[("bearer_token", "hush")], "object store option `bearer_token` is a secret"),
            ("az://bucket/x", &[("Access_Key", "hush")], "object store option `Access_Key` is a secret"),
            ("az://bucket/x", &[("sas_token", "hush")], "object store option `sas_token` is a secret"),
            ("s3://bucket/x", &[("endpoint", "http://127.0.0.1:9")], "endpoint without encryption is not allowed"),
            ("gs://bucket/x", &[("base_url", "http://127.0.0.1:9")], "endpoint without encryption is not allowed"),
        ];
        for (url, pairs, what) in cases {
            let failure = open(url, &options(pairs)).unwrap_err().downcast::<Failure>().unwrap();
            assert_eq!(failure.kind, FailureKind::Recipe, "{url}");
            assert_eq!(failure.what, what, "{url}");
            assert!(!failure.to_string().contains("hush"));
        }
    }
}
