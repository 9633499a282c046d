//! TLS 1.3 between workers and coordinator: one key pair for each run, whose public half its workers know beforehand.
//!
//! There are no certificates and no authorities: the coordinator shows a bare public key (RFC 7250), and a worker compares it with the one
//! that it was given. The worker proves itself by the run's token, as without TLS.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::Context as _;
use cloze_recipes::failure::{Failure, FailureKind};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage};
use rustls::sign::{CertifiedKey, SigningKey};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError, ServerConfig, SignatureScheme, version};
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq as _;

use crate::secret::Secret;

/// Bytes of an Ed25519 key, private or public.
const KEY_BYTES: usize = 32;

/// What stands before the 32 bytes of a private key in its PKCS #8 form, which is the same for all of them (RFC 8410, section 7).
const PRIVATE_HEAD: [u8; 16] = *b"\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20";

/// The same for a public key as TLS carries it, a `SubjectPublicKeyInfo` (RFC 8410, section 4).
const PUBLIC_HEAD: [u8; 12] = *b"\x30\x2a\x30\x05\x06\x03\x2b\x65\x70\x03\x21\x00";

/// Name of the coordinator where TLS wants one; it is neither sent nor checked, for the key is.
const COORDINATOR: &str = "coordinator";

/// The private key of a run's coordinator: 64 hexadecimal digits. It never leaves the controller's files; `Debug` hides it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RunKey(Secret);

impl RunKey {
    /// Draws a fresh key; any 256 bits are one. Fails when the system's random source cannot be read.
    pub fn random() -> anyhow::Result<Self> {
        Ok(Self(Secret::random()?))
    }

    /// What workers are given, to know the coordinator by. Fails with kind `Damaged` when this is no key.
    pub fn pinned(&self) -> anyhow::Result<PinnedKey> {
        let signer = self.signer()?;
        let public = signer.public_key().context("derive the public half of the run's key")?;
        Ok(PinnedKey(public_part(&public).context("the public half of the run's key has another form")?))
    }

    /// The coordinator's side of a connection. Fails with kind `Damaged` when this is no key.
    pub(crate) fn server_config(&self) -> anyhow::Result<Arc<ServerConfig>> {
        let signer = self.signer()?;
        let shown = CertificateDer::from(self.pinned()?.public_form().to_vec());
        let identity = Arc::new(CertifiedKey::new(vec![shown], signer));
        let builder = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&version::TLS13]);
        let mut config = builder
            .context("set up TLS 1.3")?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(identity)));
        // A worker connects once in its life, so there is nothing to resume.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Arc::new(config))
    }

    fn signer(&self) -> anyhow::Result<Arc<dyn SigningKey>> {
        // The cause would tell parts of the key.
        let damaged = || Failure::new(FailureKind::Damaged, "the run's key for TLS is none").expected("64 hexadecimal digits");
        let seed = from_hex(self.0.expose()).ok_or_else(damaged)?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from([PRIVATE_HEAD.as_slice(), &seed].concat()));
        ring::sign::any_supported_type(&key).context("read the run's key for TLS")
    }
}

/// The public key of a run's coordinator, which is no secret. Written as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PinnedKey([u8; KEY_BYTES]);

impl PinnedKey {
    /// A worker's side of a connection to the coordinator that holds this key.
    pub(crate) fn client_config(&self) -> anyhow::Result<Arc<ClientConfig>> {
        let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&version::TLS13]);
        let mut config =
            builder.context("set up TLS 1.3")?.dangerous().with_custom_certificate_verifier(Arc::new(Pin(*self))).with_no_client_auth();
        config.enable_sni = false;
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config))
    }

    /// The key as TLS carries it.
    fn public_form(&self) -> [u8; PUBLIC_HEAD.len() + KEY_BYTES] {
        let mut form = [0; PUBLIC_HEAD.len() + KEY_BYTES];
        form[..PUBLIC_HEAD.len()].copy_from_slice(&PUBLIC_HEAD);
        form[PUBLIC_HEAD.len()..].copy_from_slice(&self.0);
        form
    }
}

impl FromStr for PinnedKey {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Self, Failure> {
        from_hex(text).map(Self).ok_or_else(|| {
            let failure = Failure::new(FailureKind::Recipe, "the coordinator's key is none");
            failure.expected("64 hexadecimal digits").found(format!("{} characters", text.chars().count()))
        })
    }
}

impl TryFrom<String> for PinnedKey {
    type Error = Failure;

    fn try_from(text: String) -> Result<Self, Failure> {
        text.parse()
    }
}

impl From<PinnedKey> for String {
    fn from(key: PinnedKey) -> Self {
        key.to_string()
    }
}

impl fmt::Display for PinnedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for PinnedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PinnedKey({self})")
    }
}

/// The coordinator's name on a worker's side of a connection.
pub(crate) fn coordinator_name() -> anyhow::Result<ServerName<'static>> {
    ServerName::try_from(COORDINATOR).context("name the coordinator")
}

/// The coordinator showed another key than the one that was wanted.
#[derive(Debug, thiserror::Error)]
#[error("the coordinator has another key: {found}")]
pub(crate) struct WrongKey {
    /// The key, or that it is of another kind.
    pub found: String,
}

/// Lets one key pass.
#[derive(Debug)]
struct Pin(PinnedKey);

impl ServerCertVerifier for Pin {
    fn verify_server_cert(
        &self,
        shown: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if bool::from(shown.as_ref().ct_eq(&self.0.public_form())) {
            return Ok(ServerCertVerified::assertion());
        }
        let found = public_part(shown).map_or_else(|| "of another kind".to_owned(), |key| PinnedKey(key).to_string());
        Err(Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(WrongKey { found })))))
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _shown: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 was not offered".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        shown: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let public = SubjectPublicKeyInfoDer::from(shown.as_ref());
        verify_tls13_signature_with_raw_key(message, &public, signature, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// The 32 bytes of an Ed25519 key in the form that TLS carries; `None` for any other key.
fn public_part(form: &[u8]) -> Option<[u8; KEY_BYTES]> {
    form.strip_prefix(&PUBLIC_HEAD)?.try_into().ok()
}

fn from_hex(text: &str) -> Option<[u8; KEY_BYTES]> {
    let mut bytes = [0; KEY_BYTES];
    // Only digits from here on, so that no slice falls between the bytes of a character, and no sign is taken.
    if text.len() != 2 * KEY_BYTES || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first test vector of RFC 8032, section 7.1.
    const SEED: &str = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60";
    const PUBLIC: &str = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a";

    #[test]
    fn a_key_has_the_public_half_of_the_standard() {
        let key = RunKey(Secret::new(SEED));
        assert_eq!(key.pinned().unwrap().to_string(), PUBLIC);
        assert_eq!(PUBLIC.parse::<PinnedKey>().unwrap(), key.pinned().unwrap());
        let kept: RunKey = serde_json::from_str(&serde_json::to_string(&key).unwrap()).unwrap();
        assert_eq!(kept, key);
    }

    #[test]
    fn keys_are_fresh_and_the_private_half_is_hidden() {
        let (first, second) = (RunKey::random().unwrap(), RunKey::random().unwrap());
        assert_ne!(first.pinned().unwrap(), second.pinned().unwrap());
        assert!(!format!("{first:?}").contains(first.0.expose()));
    }

    #[test]
    fn what_is_no_key_is_refused_and_not_repeated() {
        for text in ["", "9d61", &SEED[1..], &SEED.replace('9', "g"), &format!("+{}", &SEED[1..]), &format!("{SEED}0"), &"ü".repeat(32)] {
            let private = RunKey(Secret::new(text)).server_config().unwrap_err().downcast::<Failure>().unwrap();
            assert_eq!((private.kind, &private.found), (FailureKind::Damaged, &None), "{text}");
            // Somebody may have taken the private half, or the token, for the public one.
            let public = text.parse::<PinnedKey>().unwrap_err();
            let length = format!("{} characters", text.chars().count());
            assert_eq!((public.kind, public.found.as_deref()), (FailureKind::Recipe, Some(length.as_str())), "{text}");
            for failure in [private, public] {
                assert!(text.is_empty() || !format!("{failure:?}").contains(text), "{failure:?}");
            }
        }
    }
}
