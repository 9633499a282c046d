//! Messages and frames, there and back.

use cloze_recipes::failure::FailureKind;

use super::*;

/// Bytes of a frame's length prefix.
const LENGTH_BYTES: usize = 4;

fn report() -> StepReport {
    StepReport {
        step: 7,
        loss: 0.1 + 0.2,
        learning_rate: 1e-5,
        gradient_norm: 1.0 / 3.0,
        examples: 32,
        tokens: 4096,
        labels: 32,
        seconds: 0.25,
        examples_per_s: 128.0,
        tokens_per_s: 16_384.0,
        before: Unreported::default(),
    }
}

fn file() -> SavedFile {
    SavedFile { name: "optimizer-1.safetensors".to_owned(), size: 12, blake3: "ab".to_owned() }
}

fn worker_messages() -> Vec<WorkerMessage> {
    vec![
        WorkerMessage::Join(JoinRequest {
            protocol_version: PROTOCOL_VERSION,
            token: Secret::new("t"),
            recipe_hash: "aa".to_owned(),
            build: "b".to_owned(),
            executable: "e".to_owned(),
            worker: 3,
            process_id: 77,
            host: "node".to_owned(),
            collective_address: "127.0.0.1:9".to_owned(),
            held: Some(Held { generation: 2, step: 40 }),
        }),
        WorkerMessage::Exited(ExitReport {
            protocol_version: PROTOCOL_VERSION,
            token: Secret::new("t"),
            worker: 3,
            host: "node".to_owned(),
            process_id: 77,
            status: "SIGKILL".to_owned(),
            tail: "last\nwords".to_owned(),
            dump: Some("/dumps/3".to_owned()),
            is_replaced: true,
        }),
        WorkerMessage::Heartbeat { generation: 1, step: 2, phase: Phase::Saving, waiting: true, progress: 9 },
        WorkerMessage::Ready { generation: 1, state_step: Some(17), share: None },
        WorkerMessage::Ready { generation: 0, state_step: None, share: None },
        WorkerMessage::Step { generation: 1, report: report() },
        WorkerMessage::Restored {
            generation: 2,
            step: 50,
            source: "file:///x".to_owned(),
            skipped: vec!["y: cut".to_owned()],
            seconds: 0.5,
        },
        WorkerMessage::ShareSaved { generation: 2, step: 50, files: vec![file()] },
        WorkerMessage::CheckpointSaved { generation: 2, step: 50, url: "u".to_owned(), bytes: 9, seconds: 0.25, blocked_s: 0.125 },
        WorkerMessage::CheckpointFailed { generation: 2, step: 50, reason: "disk full".to_owned() },
        WorkerMessage::Broken { generation: 2, reason: "receive".to_owned() },
        WorkerMessage::Failed {
            failure: Failure::new(FailureKind::Run, "loss is not finite").at("step 3"),
            class: FailureClass::NotFinite,
            generation: 2,
            step: 3,
            culprit: true,
        },
        WorkerMessage::Finished { generation: 2, step: 300, stopped: false },
        WorkerMessage::Ping { id: 5 },
    ]
}

fn coordinator_messages() -> Vec<CoordinatorMessage> {
    vec![
        CoordinatorMessage::Welcome { adopted: true },
        CoordinatorMessage::Refused { failure: Failure::new(FailureKind::Environment, "excluded") },
        CoordinatorMessage::Noted {},
        start(1),
        CoordinatorMessage::Abort { generation: 1, reason: "lost".to_owned() },
        CoordinatorMessage::Regroup { generation: 1, reason: "joined".to_owned() },
        CoordinatorMessage::Save { reason: "SIGUSR1".to_owned() },
        CoordinatorMessage::Stop { reason: "SIGTERM".to_owned() },
        CoordinatorMessage::ShareSaved { generation: 1, step: 4, rank: 1, files: vec![file()] },
        CoordinatorMessage::Pulse {},
        CoordinatorMessage::Pong { id: 5 },
        CoordinatorMessage::Released {},
    ]
}

fn start(rank: u32) -> CoordinatorMessage {
    CoordinatorMessage::Start {
        generation: 4,
        rank,
        members: vec![0, 2],
        peers: vec!["127.0.0.1:1".to_owned(), "127.0.0.1:2".to_owned()],
        collective_key: Secret::new("k"),
        source: StateSource::Peer { rank: 1, step: 17 },
        until_step: Some(40),
        saves_only: false,
    }
}

#[test]
fn messages_survive_a_blocking_round_trip() {
    let mut wire = Vec::new();
    for message in worker_messages() {
        write_message_blocking(&mut wire, &message).unwrap();
    }
    for message in coordinator_messages() {
        write_message_blocking(&mut wire, &message).unwrap();
    }
    let mut reader = wire.as_slice();
    for message in worker_messages() {
        let body = read_frame_blocking(&mut reader).unwrap().unwrap();
        assert_eq!(decode::<WorkerMessage>(&body).unwrap(), message);
    }
    for message in coordinator_messages() {
        let body = read_frame_blocking(&mut reader).unwrap().unwrap();
        assert_eq!(decode::<CoordinatorMessage>(&body).unwrap(), message);
    }
    assert!(read_frame_blocking(&mut reader).unwrap().is_none());
}

#[tokio::test]
async fn both_framings_are_the_same() {
    let message = start(0);
    let mut asynchronous = Vec::new();
    write_message(&mut asynchronous, &message).await.unwrap();
    let mut blocking = Vec::new();
    write_message_blocking(&mut blocking, &message).unwrap();
    assert_eq!(asynchronous, blocking);
    assert_eq!(Frame::new(&message).unwrap().parts().concat(), blocking);
    let mut reader = asynchronous.as_slice();
    let body = read_frame(&mut reader).await.unwrap().unwrap();
    assert_eq!(decode::<CoordinatorMessage>(&body).unwrap(), message);
    assert!(read_frame(&mut reader).await.unwrap().is_none());
}

#[test]
fn a_start_that_is_encoded_once_is_each_ranks_own() {
    let peers = ["127.0.0.1:1".to_owned(), "127.0.0.1:2".to_owned()];
    for source in [StateSource::Checkpoint, StateSource::Peer { rank: 1, step: 17 }, StateSource::Shares { step: 17, world_size: 4 }] {
        let terms = StartTerms { until_step: Some(40), saves_only: true };
        let frames = StartFrames::new(4, (&[0, 2], &peers), &Secret::new("k"), &source, terms).unwrap();
        for wanted_rank in [0, 1, 12_345] {
            let wire = frames.for_rank(wanted_rank).unwrap().parts().concat();
            let body = read_frame_blocking(&mut wire.as_slice()).unwrap().unwrap();
            assert_eq!(body.len() + LENGTH_BYTES, wire.len());
            let CoordinatorMessage::Start {
                generation,
                rank,
                members,
                peers: told,
                collective_key,
                source: told_source,
                until_step,
                saves_only,
            } = decode(&body).unwrap()
            else {
                panic!("a start")
            };
            assert_eq!((generation, rank, members), (4, wanted_rank, vec![0, 2]));
            assert_eq!((until_step, saves_only), (Some(40), true));
            assert_eq!((told.as_slice(), &collective_key, &told_source), (peers.as_slice(), &Secret::new("k"), &source));
        }
    }
}

#[test]
fn a_start_for_ten_thousand_fits_and_one_that_is_too_long_does_not() {
    let address = |worker: u32| format!("host-{worker}.cluster.example.org:65535");
    let frames = |num_workers: u32| {
        let members: Vec<u32> = (0..num_workers).collect();
        let peers: Vec<String> = members.iter().map(|&worker| address(worker)).collect();
        StartFrames::new(1, (&members, &peers), &Secret::new("k"), &StateSource::Checkpoint, StartTerms::default())
    };
    assert!(frames(10_000).unwrap().for_rank(9_999).is_ok());
    assert!(frames(200_000).is_err_and(|error| matches!(error, FrameError::TooLong { .. })));
}

#[test]
fn a_frame_is_a_big_endian_length_and_json() {
    let frame = encode(&CoordinatorMessage::Pulse {}).unwrap();
    assert_eq!(frame, b"\x00\x00\x00\x13{\"message\":\"pulse\"}");
}

#[test]
fn bad_frames_are_refused() {
    let too_long = (MAX_FRAME_BYTES + 1).to_be_bytes();
    assert!(matches!(read_frame_blocking(&mut too_long.as_slice()), Err(FrameError::TooLong { bytes: 4_194_305 })));
    let cut_length = [0_u8, 0];
    assert!(matches!(read_frame_blocking(&mut cut_length.as_slice()), Err(FrameError::Io(_))));
    let cut_body = [0_u8, 0, 0, 5, b'{'];
    assert!(matches!(read_frame_blocking(&mut cut_body.as_slice()), Err(FrameError::Io(_))));
    assert!(matches!(decode::<WorkerMessage>(b"{\"message\":\"dance\"}"), Err(FrameError::Json(_))));
    let long = CoordinatorMessage::Stop { reason: "x".repeat(MAX_FRAME_BYTES as usize) };
    assert!(matches!(encode(&long), Err(FrameError::TooLong { .. })));
    assert!(matches!(Frame::new(&long), Err(FrameError::TooLong { .. })));
}

#[tokio::test]
async fn a_stranger_gets_a_short_frame_only() {
    let wire = encode(&CoordinatorMessage::Stop { reason: "x".repeat(100) }).unwrap();
    let bytes = (wire.len() - LENGTH_BYTES) as u32;
    assert!(read_frame_within(&mut wire.as_slice(), bytes).await.unwrap().is_some());
    assert!(matches!(read_frame_within(&mut wire.as_slice(), bytes - 1).await, Err(FrameError::TooLong { .. })));
}

#[test]
fn a_loss_that_is_not_finite_survives() {
    let message = WorkerMessage::Step { generation: 1, report: StepReport { loss: f64::NAN, gradient_norm: f64::INFINITY, ..report() } };
    let frame = encode(&message).unwrap();
    let Ok(WorkerMessage::Step { report, .. }) = decode(&frame[LENGTH_BYTES..]) else { panic!("a step") };
    assert!(report.loss.is_nan() && report.gradient_norm.is_nan());
    assert_eq!(report.step, 7);
}

#[test]
fn a_token_is_not_printed() {
    let printed = format!("{:?}", worker_messages()[0]);
    assert!(printed.contains("Secret(…)"), "{printed}");
}
