//! Who may join: the token first, then protocol version, recipe and build.

use cloze_recipes::failure::{Failure, FailureKind};
use serde::Deserialize;

use crate::protocol::{self, ExitReport, JoinRequest, PROTOCOL_VERSION, WorkerMessage};
use crate::secret::Secret;

/// What a worker must bring to be let in.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    /// The run's token.
    pub token: Secret,
    /// Hash of the run's recipe.
    pub recipe_hash: String,
    /// Build of the worker binary that the launcher starts.
    pub build: String,
}

/// What a connection is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Errand {
    /// A worker takes its seat.
    Join(JoinRequest),
    /// A launcher on another host tells of a process's end.
    Exit(ExitReport),
}

/// The fields that every version of a first message has.
#[derive(Deserialize)]
struct JoinHead {
    token: Secret,
    protocol_version: u32,
}

/// Checks a connection's first frame; fails with the [`Failure`] that the worker is told.
pub(super) fn admit(identity: &Identity, body: &[u8]) -> anyhow::Result<Errand> {
    let head: JoinHead = protocol::decode(body).map_err(|error| unreadable(&anyhow::Error::new(error)))?;
    if head.token != identity.token {
        return Err(Failure::new(FailureKind::Mismatch, "the coordinator does not know this token")
            .hint("workers are started by `cloze train` or `cloze join`, which give them the token; CLOZE_TOKEN must be that of this run")
            .into());
    }
    if head.protocol_version != PROTOCOL_VERSION {
        return Err(Failure::new(FailureKind::Mismatch, "worker and coordinator speak different protocol versions")
            .expected(PROTOCOL_VERSION)
            .found(head.protocol_version)
            .hint("use `cloze` and `cloze-worker` of one build")
            .into());
    }
    let join = match protocol::decode(body).map_err(|error| unreadable(&anyhow::Error::new(error)))? {
        WorkerMessage::Join(join) => join,
        WorkerMessage::Exited(report) => return Ok(Errand::Exit(report)),
        _ => return Err(Failure::new(FailureKind::Mismatch, "the first message is not a join").into()),
    };
    if join.recipe_hash != identity.recipe_hash {
        return Err(Failure::new(FailureKind::Mismatch, "the worker read another recipe")
            .expected(format!("recipe hash {}", identity.recipe_hash))
            .found(format!("recipe hash {}", join.recipe_hash))
            .hint("recipe.yaml in the run folder is another one than the controller's; start the worker anew, or put the old recipe back")
            .into());
    }
    if join.build != identity.build {
        return Err(Failure::new(FailureKind::Mismatch, "the worker is of another build")
            .expected(format!("build {}", identity.build))
            .found(format!("build {}", join.build))
            .hint("use `cloze` and `cloze-worker` of one build")
            .into());
    }
    Ok(Errand::Join(join))
}

fn unreadable(error: &anyhow::Error) -> Failure {
    Failure::new(FailureKind::Mismatch, "the join message is not understood").because(format!("{error:#}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity { token: Secret::new("right"), recipe_hash: "aaaa".to_owned(), build: "b1".to_owned() }
    }

    fn join() -> JoinRequest {
        JoinRequest {
            protocol_version: PROTOCOL_VERSION,
            token: Secret::new("right"),
            recipe_hash: "aaaa".to_owned(),
            build: "b1".to_owned(),
            executable: "e".to_owned(),
            worker: 0,
            process_id: 1,
            host: "h".to_owned(),
            collective_address: "127.0.0.1:1".to_owned(),
            held: None,
        }
    }

    fn refusal(request: JoinRequest) -> Failure {
        let body = protocol::encode(&WorkerMessage::Join(request)).unwrap().split_off(4);
        admit(&identity(), &body).unwrap_err().downcast::<Failure>().unwrap()
    }

    #[test]
    fn the_right_worker_is_let_in() {
        let body = protocol::encode(&WorkerMessage::Join(join())).unwrap().split_off(4);
        assert_eq!(admit(&identity(), &body).unwrap(), Errand::Join(join()));
    }

    #[test]
    fn others_are_refused_with_both_values() {
        let recipe = refusal(JoinRequest { recipe_hash: "bbbb".to_owned(), ..join() });
        assert_eq!(recipe.expected.as_deref(), Some("recipe hash aaaa"));
        assert_eq!(recipe.found.as_deref(), Some("recipe hash bbbb"));
        let build = refusal(JoinRequest { build: "b2".to_owned(), ..join() });
        assert_eq!((build.expected.as_deref(), build.found.as_deref()), (Some("build b1"), Some("build b2")));
        let version = refusal(JoinRequest { protocol_version: 99, ..join() });
        assert_eq!((version.expected, version.found.as_deref()), (Some(PROTOCOL_VERSION.to_string()), Some("99")));
    }

    #[test]
    fn a_wrong_token_learns_nothing() {
        let wrong = JoinRequest { token: Secret::new("wrong"), recipe_hash: "bbbb".to_owned(), protocol_version: 99, ..join() };
        let failure = refusal(wrong);
        assert_eq!(failure.what, "the coordinator does not know this token");
        assert_eq!((failure.expected, failure.found), (None, None));
    }

    #[test]
    fn a_later_version_with_other_fields_is_told_so() {
        let body = br#"{"message":"join","token":"right","protocol_version":9999,"colour":"red"}"#;
        let failure = admit(&identity(), body).unwrap_err().downcast::<Failure>().unwrap();
        assert_eq!(failure.found.as_deref(), Some("9999"));
    }

    #[test]
    fn nonsense_is_refused() {
        for body in [b"GET / HTTP/1.1".as_slice(), b"{}", b"[]"] {
            assert!(admit(&identity(), body).is_err());
        }
        let ping = format!(r#"{{"message":"ping","token":"right","protocol_version":{PROTOCOL_VERSION},"id":1}}"#);
        let failure = admit(&identity(), ping.as_bytes()).unwrap_err().downcast::<Failure>().unwrap();
        assert_eq!(failure.what, "the first message is not a join");
    }
}
