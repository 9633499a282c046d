//! What only TLS promises: nobody else is spoken to, and nobody else can read.

use std::sync::atomic::AtomicUsize;

use super::*;

/// A token that stands out among other bytes.
const TOKEN: &str = "open-sesame-open-sesame";

/// Messages each way while both ways are busy; together 32 MiB, about three times what the sockets of a connection hold.
const BUSY_MESSAGES: usize = 32;

/// Bytes of each.
const BUSY_BYTES: usize = 1 << 20;

fn failure(joined: anyhow::Result<Client>) -> Failure {
    joined.unwrap_err().downcast::<Failure>().unwrap()
}

/// Answers one connection by TLS with a key; returns what the handshake came to.
fn answer_with(key: &RunKey, listener: &TcpListener) -> io::Result<()> {
    let (mut socket, _) = listener.accept().unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut connection = ServerConnection::new(key.server_config().unwrap()).unwrap();
    while connection.is_handshaking() {
        connection.complete_io(&mut socket)?;
    }
    // In TLS 1.3 a client's objection comes after the server believes that all is well.
    connection.complete_io(&mut socket).map(drop)
}

#[test]
fn a_coordinator_with_another_key_is_not_spoken_to() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let joining = std::thread::spawn(move || Client::join(Stage::Tls.options(&address, 0)));
    let objection = answer_with(&run_key('2'), &listener).unwrap_err();
    assert!(matches!(objection.get_ref().unwrap().downcast_ref(), Some(rustls::Error::AlertReceived(_))), "{objection:?}");
    let failure = failure(joining.join().unwrap());
    assert_eq!((failure.kind, failure.what.as_str()), (FailureKind::Mismatch, "the coordinator does not hold this run's key"));
    assert_eq!(failure.expected, Some(format!("key {}", run_key('1').pinned().unwrap())));
    assert_eq!(failure.found, Some(format!("key {}", run_key('2').pinned().unwrap())));
}

#[test]
fn an_impostor_does_not_end_the_wait_for_the_coordinator() {
    let (client, listener, socket) = Stage::Tls.seat(PATIENCE);
    drop(socket);
    assert!(answer_with(&run_key('2'), &listener).is_err());
    // One that speaks in clear says that the worker is let go, and is not believed either.
    let (mut impostor, _) = listener.accept().unwrap();
    protocol::write_message_blocking(&mut impostor, &CoordinatorMessage::Welcome { adopted: false }).unwrap();
    protocol::write_message_blocking(&mut impostor, &CoordinatorMessage::Released {}).unwrap();
    let (request, _socket) = Stage::Tls.receive(&listener, &CoordinatorMessage::Welcome { adopted: false });
    assert_eq!((request.worker, request.token), (0, Secret::new("t")));
    assert_eq!(client.stop_requested(), None);
}

#[test]
fn a_client_that_is_dropped_does_not_wait_for_a_handshake() {
    let (client, listener, socket) = Stage::Tls.seat(PATIENCE);
    drop(socket);
    let (_silent, _) = listener.accept().unwrap();
    let begun = Instant::now();
    drop(client);
    assert!(begun.elapsed() < connection::JOIN_REPLY_TIMEOUT / 2, "{:?}", begun.elapsed());
}

/// Passes one connection on to an address; returns what went each way, all together.
fn overhear(listener: TcpListener, address: SocketAddr) -> JoinHandle<Vec<u8>> {
    fn pass_on(mut from: TcpStream, mut to: TcpStream) -> Vec<u8> {
        let (mut heard, mut bytes) = (Vec::new(), [0; 4096]);
        while let Ok(received @ 1..) = from.read(&mut bytes) {
            heard.extend_from_slice(&bytes[..received]);
            if to.write_all(&bytes[..received]).is_err() {
                break;
            }
        }
        // The other side may be gone already.
        let _ = to.shutdown(std::net::Shutdown::Both);
        heard
    }
    std::thread::spawn(move || {
        let (near, _) = listener.accept().unwrap();
        let far = TcpStream::connect(address).unwrap();
        let (near_again, far_again) = (near.try_clone().unwrap(), far.try_clone().unwrap());
        let there = std::thread::spawn(move || pass_on(near, far));
        let back = pass_on(far_again, near_again);
        [there.join().unwrap(), back].concat()
    })
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

#[test]
fn who_listens_on_the_wire_learns_no_secret() {
    for (stage, is_readable) in [(Stage::Clear, true), (Stage::Tls, false)] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let between = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = between.local_addr().unwrap().to_string();
        let wire = overhear(between, listener.local_addr().unwrap());
        let joining = std::thread::spawn(move || Client::join(JoinOptions { token: Secret::new(TOKEN), ..stage.options(&address, 0) }));
        let (request, mut socket) = stage.receive(&listener, &CoordinatorMessage::Welcome { adopted: false });
        assert_eq!(request.token, Secret::new(TOKEN));
        let client = joining.join().unwrap().unwrap();
        say(&mut socket, &start(1));
        assert_eq!(next(&client), start(1));
        drop((client, socket));
        let heard = wire.join().unwrap();
        for secret in [TOKEN, "message", "collective_key"] {
            assert_eq!(contains(&heard, secret), is_readable, "{secret}");
        }
    }
}

/// Answers one connection by TLS with a key; returns the first message that comes by it, or nothing where the worker objects instead.
fn hear_with(key: &RunKey, listener: &TcpListener) -> Vec<u8> {
    let (socket, _) = listener.accept().unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut stream = StreamOwned::new(ServerConnection::new(key.server_config().unwrap()).unwrap(), socket);
    match protocol::read_frame_blocking(&mut stream) {
        Ok(message) => message.unwrap_or_default(),
        Err(_objection) => Vec::new(),
    }
}

/// Answers one connection in clear with a welcome; returns all that came by it.
fn hear_in_clear(listener: &TcpListener) -> Vec<u8> {
    let (mut socket, _) = listener.accept().unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut heard = vec![0; 4096];
    let received = socket.read(&mut heard).unwrap();
    heard.truncate(received);
    protocol::write_message_blocking(&mut socket, &CoordinatorMessage::Welcome { adopted: false }).unwrap();
    // The worker may reset the connection; what was read before stays.
    let _ = socket.read_to_end(&mut heard);
    heard
}

#[test]
fn the_token_is_not_told_to_a_stranger() {
    let join = || {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let options = JoinOptions { token: Secret::new(TOKEN), ..Stage::Tls.options(&address, 0) };
        (listener, std::thread::spawn(move || Client::join(options)))
    };
    // Who holds the run's key can read the token, so that whoever holds another one would.
    let (listener, joining) = join();
    assert!(contains(&hear_with(&run_key('1'), &listener), TOKEN));
    assert!(joining.join().unwrap().is_err(), "it was never answered");
    let (listener, joining) = join();
    assert_eq!(String::from_utf8_lossy(&hear_with(&run_key('2'), &listener)), "");
    assert_eq!(failure(joining.join().unwrap()).kind, FailureKind::Mismatch);
    let (listener, joining) = join();
    let heard = hear_in_clear(&listener);
    assert!(!heard.is_empty() && !contains(&heard, TOKEN), "{}", String::from_utf8_lossy(&heard));
    assert_eq!(failure(joining.join().unwrap()).kind, FailureKind::Mismatch);
}

/// Time without progress after which a writer is taken to wait for the socket; well below the time that it may wait.
const STILLNESS: Duration = Duration::from_millis(300);

/// The coordinator hears nothing until the worker's writer waits for the socket, and then says everything first: neither gets to the end
/// unless the worker's reader reads on while its writer waits.
fn both_ways_can_be_busy(stage: Stage) {
    let (client, _listener, mut socket) = stage.seat(PATIENCE);
    let word = |index: usize| format!("{index:02}").repeat(BUSY_BYTES / 2);
    let (client, num_said) = (Arc::new(client), Arc::new(AtomicUsize::new(0)));
    let speaking = std::thread::spawn({
        let (client, num_said) = (Arc::clone(&client), Arc::clone(&num_said));
        move || {
            for index in 0..BUSY_MESSAGES {
                client.send(&WorkerMessage::Broken { generation: 1, reason: word(index) }).unwrap();
                num_said.store(index + 1, Ordering::SeqCst);
            }
        }
    });
    let mut before = 0;
    while before == 0 || num_said.load(Ordering::SeqCst) != before {
        before = num_said.load(Ordering::SeqCst);
        std::thread::sleep(STILLNESS);
    }
    assert!(before < BUSY_MESSAGES, "the sockets held everything, so nobody had to wait");
    for index in 0..BUSY_MESSAGES {
        say(&mut socket, &CoordinatorMessage::Save { reason: word(index) });
    }
    for index in 0..BUSY_MESSAGES {
        assert_eq!(hear_word(&mut socket), WorkerMessage::Broken { generation: 1, reason: word(index) }, "whole and in their order");
    }
    speaking.join().unwrap();
    assert_eq!(client.take_save_request(), Some(word(0)));
}

on_both_stages!(both_ways_can_be_busy);
