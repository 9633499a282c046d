//! The door of a coordinator with TLS: who is refused, and how.

use tokio::io::AsyncWriteExt as _;

use super::*;
use crate::tls::RunKey;

async fn refusal(options: JoinOptions) -> Failure {
    try_join(options).await.unwrap_err().downcast::<Failure>().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_speaks_in_clear_is_refused_whatever_it_brings() {
    let sandbox = Sandbox::start(1, Some(RunKey::random().unwrap())).await;
    for token in ["token", "guess"] {
        let failure = refusal(JoinOptions { coordinator_key: None, token: Secret::new(token), ..sandbox.options(0) }).await;
        assert_eq!((failure.kind, failure.what.as_str()), (FailureKind::Mismatch, "this coordinator speaks TLS only"), "{token}");
    }
    // By TLS the seat is still free.
    sandbox.join(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_without_tls_or_with_another_key_is_refused() {
    let other = RunKey::random().unwrap().pinned().unwrap();
    let cases =
        [(None, "the coordinator does not speak TLS"), (Some(RunKey::random().unwrap()), "the coordinator does not hold this run's key")];
    for (key, what) in cases {
        let sandbox = Sandbox::start(1, key).await;
        let failure = refusal(JoinOptions { coordinator_key: Some(other), ..sandbox.options(0) }).await;
        assert_eq!((failure.kind, failure.what.as_str()), (FailureKind::Mismatch, what));
        sandbox.join(0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handshakes_that_do_not_go_on_are_bounded() {
    let sandbox = Sandbox::start(1, Some(RunKey::random().unwrap())).await;
    let mut stuck = Vec::new();
    for _ in 0..=MAX_UNAUTHENTICATED_CONNECTIONS {
        let mut socket = TcpStream::connect(sandbox.address).await.unwrap();
        // The begin of a handshake whose rest never comes.
        socket.write_all(&[0x16, 0x03, 0x01, 0x01, 0x00]).await.unwrap();
        stuck.push(socket);
    }
    sandbox.join(0).await;
    let mut first = stuck.swap_remove(0);
    // What comes may be an alert; then the end, or a reset for what was not read.
    let ended = async { while first.read(&mut [0; 64]).await.is_ok_and(|received| received > 0) {} };
    timeout(PATIENCE, ended).await.unwrap();
}
