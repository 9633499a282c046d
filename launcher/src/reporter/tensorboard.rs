//! `TensorBoard` event files: length-framed records with masked CRC-32C around a handful of protobuf fields.
//!
//! A record is `u64 length · u32 crc(length) · data · u32 crc(data)`, all little endian. The data is one `Event` message:
//!
//! | field          | number | type                                                    |
//! |----------------|--------|---------------------------------------------------------|
//! | `wall_time`    | 1      | double                                                  |
//! | `step`         | 2      | int64                                                   |
//! | `file_version` | 3      | string, in the first record only                        |
//! | `summary`      | 5      | `value` (1): `tag` (1) string, `simple_value` (2) float |
//! | `session_log`  | 7      | `status` (1) enum, `START` = 1                          |
//!
//! After a restore at step s a session start with step s + 1 makes the reader drop what an aborted generation wrote from that
//! step on, so that replayed steps do not show twice.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use cloze_cluster::host::host_name;
use cloze_cluster::{Event, Recorded, StepReport};

/// First record of every file; from this version on a session start drops replayed steps.
const FILE_VERSION: &str = "brain.Event:2";

/// `SessionLog.START`.
const SESSION_START: u64 = 1;

/// Added to a rotated CRC, so that the CRC of data that holds CRCs is not degenerate.
const MASK_DELTA: u32 = 0xa282_ead8;

/// File names that are tried before giving up; one process makes one file per run and second.
const MAX_FILE_NAMES: u32 = 1000;

/// Protobuf wire types.
const VARINT: u64 = 0;
const FIXED_64: u64 = 1;
const LENGTH_DELIMITED: u64 = 2;
const FIXED_32: u64 = 5;

/// One event file.
#[derive(Debug)]
pub struct TensorBoard {
    file: File,
}

impl TensorBoard {
    /// Creates a file of its own in `folder` and writes its first record.
    pub fn create(folder: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(io::Error::other)?;
        let mut file = new_file(folder, now.as_secs())?;
        let mut event = Vec::new();
        put_double(&mut event, 1, now.as_secs_f64());
        put_bytes(&mut event, 3, FILE_VERSION.as_bytes());
        file.write_all(&record(&event))?;
        Ok(Self { file })
    }

    /// Writes a step's scalars, or the session start of a restore; other events have no place in `TensorBoard`.
    pub fn write(&mut self, recorded: &Recorded) -> io::Result<()> {
        let event = match &recorded.event {
            Event::Step { report, .. } => scalars_event(recorded.time, report),
            Event::Restored { step, .. } => session_start_event(recorded.time, step + 1),
            _ => return Ok(()),
        };
        self.file.write_all(&record(&event))
    }
}

fn new_file(folder: &Path, seconds: u64) -> io::Result<File> {
    let (host, process_id) = (host_name(), std::process::id());
    for number in 0..MAX_FILE_NAMES {
        let path = folder.join(format!("events.out.tfevents.{seconds:010}.{host}.{process_id}.{number}"));
        match OpenOptions::new().write(true).create_new(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => return other,
        }
    }
    Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("{MAX_FILE_NAMES} event files of this second already exist")))
}

fn scalars_event(time: f64, report: &StepReport) -> Vec<u8> {
    let scalars = [
        ("train/loss", report.loss),
        ("train/learning_rate", report.learning_rate),
        ("train/gradient_norm", report.gradient_norm),
        ("train/examples_per_s", report.examples_per_s),
        ("train/tokens_per_s", report.tokens_per_s),
    ];
    let mut summary = Vec::new();
    for (tag, number) in scalars {
        let mut value = Vec::new();
        put_bytes(&mut value, 1, tag.as_bytes());
        put_float(&mut value, 2, number as f32);
        put_bytes(&mut summary, 1, &value);
    }
    let mut event = Vec::new();
    put_double(&mut event, 1, time);
    put_varint(&mut event, 2, report.step);
    put_bytes(&mut event, 5, &summary);
    event
}

fn session_start_event(time: f64, step: u64) -> Vec<u8> {
    let mut session_log = Vec::new();
    put_varint(&mut session_log, 1, SESSION_START);
    let mut event = Vec::new();
    put_double(&mut event, 1, time);
    put_varint(&mut event, 2, step);
    put_bytes(&mut event, 7, &session_log);
    event
}

fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(data.len() + 16);
    record.extend_from_slice(&length);
    record.extend_from_slice(&masked_crc(&length).to_le_bytes());
    record.extend_from_slice(data);
    record.extend_from_slice(&masked_crc(data).to_le_bytes());
    record
}

fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(MASK_DELTA)
}

fn put_varint(message: &mut Vec<u8>, field: u64, value: u64) {
    put_raw_varint(message, (field << 3) | VARINT);
    put_raw_varint(message, value);
}

fn put_double(message: &mut Vec<u8>, field: u64, value: f64) {
    put_raw_varint(message, (field << 3) | FIXED_64);
    message.extend_from_slice(&value.to_le_bytes());
}

fn put_float(message: &mut Vec<u8>, field: u64, value: f32) {
    put_raw_varint(message, (field << 3) | FIXED_32);
    message.extend_from_slice(&value.to_le_bytes());
}

fn put_bytes(message: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_raw_varint(message, (field << 3) | LENGTH_DELIMITED);
    put_raw_varint(message, bytes.len() as u64);
    message.extend_from_slice(bytes);
}

/// Seven bits a byte, lowest first; the top bit says that more follow.
fn put_raw_varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

#[cfg(test)]
mod tests {
    use cloze_cluster::Unreported;

    use super::*;

    /// CRC-32C bit by bit, from its definition (reflected polynomial 0x82f63b78), independent of the crate that writes.
    fn slow_crc(bytes: &[u8]) -> u32 {
        let mut crc = u32::MAX;
        for &byte in bytes {
            crc ^= u32::from(byte);
            for _ in 0..8 {
                crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
            }
        }
        !crc
    }

    fn slow_masked_crc(bytes: &[u8]) -> u32 {
        let crc = u64::from(slow_crc(bytes));
        (((crc >> 15) | ((crc << 17) & 0xffff_ffff)) + 0xa282_ead8) as u32
    }

    /// Splits a file into records and checks both CRCs of each.
    fn records(mut bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut records = Vec::new();
        while !bytes.is_empty() {
            let (length, rest) = bytes.split_at(8);
            let (length_crc, rest) = rest.split_at(4);
            assert_eq!(length_crc, slow_masked_crc(length).to_le_bytes());
            let (data, rest) = rest.split_at(u64::from_le_bytes(length.try_into().unwrap()) as usize);
            let (data_crc, rest) = rest.split_at(4);
            assert_eq!(data_crc, slow_masked_crc(data).to_le_bytes());
            records.push(data.to_vec());
            bytes = rest;
        }
        records
    }

    /// A protobuf message as (field number, raw value); varints as eight bytes.
    fn fields(mut bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
        fn varint(bytes: &mut &[u8]) -> u64 {
            let mut value = 0;
            for shift in (0_u32..).step_by(7) {
                let (first, rest) = bytes.split_first().unwrap();
                *bytes = rest;
                value |= u64::from(first & 0x7f) << shift;
                if first & 0x80 == 0 {
                    break;
                }
            }
            value
        }
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let key = varint(&mut bytes);
            let length = match key & 7 {
                0 => {
                    fields.push((key >> 3, varint(&mut bytes).to_le_bytes().to_vec()));
                    continue;
                }
                1 => 8,
                2 => varint(&mut bytes) as usize,
                5 => 4,
                other => panic!("wire type {other}"),
            };
            let (value, rest) = bytes.split_at(length);
            fields.push((key >> 3, value.to_vec()));
            bytes = rest;
        }
        fields
    }

    fn step(step: u64, loss: f64) -> Recorded {
        let report = StepReport {
            step,
            loss,
            learning_rate: 0.001,
            gradient_norm: 0.5,
            examples: 8,
            tokens: 100,
            labels: 8,
            seconds: 0.5,
            examples_per_s: 16.0,
            tokens_per_s: 200.0,
            before: Unreported::default(),
        };
        Recorded { time: 1.0e9, event: Event::Step { generation: 1, report } }
    }

    fn only_file(folder: &Path) -> Vec<u8> {
        let mut entries = fs::read_dir(folder).unwrap();
        let bytes = fs::read(entries.next().unwrap().unwrap().path()).unwrap();
        assert!(entries.next().is_none());
        bytes
    }

    #[test]
    fn crcs_have_their_known_values() {
        // The check value of CRC-32C, and the first twelve bytes that every TensorBoard file begins with: length 24 and its CRC.
        assert_eq!(slow_crc(b"123456789"), 0xe306_9283);
        assert_eq!(masked_crc(b"123456789"), slow_masked_crc(b"123456789"));
        assert_eq!(masked_crc(&24_u64.to_le_bytes()).to_le_bytes(), *b"\xa3\x7f\x4b\x22");
    }

    #[test]
    fn a_file_begins_with_its_version() {
        let folder = tempfile::tempdir().unwrap();
        TensorBoard::create(folder.path()).unwrap();
        let bytes = only_file(folder.path());
        assert_eq!(&bytes[..12], b"\x18\0\0\0\0\0\0\0\xa3\x7f\x4b\x22");
        let records = records(&bytes);
        assert_eq!(records.len(), 1);
        assert_eq!(fields(&records[0])[1], (3, b"brain.Event:2".to_vec()));
    }

    #[test]
    fn a_step_is_five_scalars() {
        let folder = tempfile::tempdir().unwrap();
        let mut board = TensorBoard::create(folder.path()).unwrap();
        board.write(&step(300, 1.25)).unwrap();
        board.write(&Recorded { time: 1.0, event: Event::RunStopped { step: 300 } }).unwrap();
        let records = records(&only_file(folder.path()));
        assert_eq!(records.len(), 2);
        let event = fields(&records[1]);
        assert_eq!(event[0], (1, 1.0e9_f64.to_le_bytes().to_vec()));
        assert_eq!(event[1], (2, 300_u64.to_le_bytes().to_vec()));
        assert_eq!((event.len(), event[2].0), (3, 5));
        let values: Vec<(String, Vec<u8>)> = fields(&event[2].1)
            .iter()
            .map(|(_, value)| {
                let value = fields(value);
                (String::from_utf8(value[0].1.clone()).unwrap(), value[1].1.clone())
            })
            .collect();
        let names: Vec<&str> = values.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["train/loss", "train/learning_rate", "train/gradient_norm", "train/examples_per_s", "train/tokens_per_s"]);
        assert_eq!(values[0].1, 1.25_f32.to_le_bytes());
        assert_eq!(values[4].1, 200.0_f32.to_le_bytes());
    }

    #[test]
    fn a_restore_starts_a_session_after_the_restored_step() {
        let folder = tempfile::tempdir().unwrap();
        let mut board = TensorBoard::create(folder.path()).unwrap();
        let event = Event::Restored { generation: 2, step: 50, source: "file:///c".to_owned(), skipped: Vec::new(), seconds: 0.1 };
        board.write(&Recorded { time: 2.0, event }).unwrap();
        let records = records(&only_file(folder.path()));
        let event = fields(&records[1]);
        assert_eq!(event[1], (2, 51_u64.to_le_bytes().to_vec()));
        assert_eq!((event[2].0, fields(&event[2].1)), (7, vec![(1, 1_u64.to_le_bytes().to_vec())]));
    }

    #[test]
    fn two_files_in_one_second_have_two_names() {
        let folder = tempfile::tempdir().unwrap();
        for _ in 0..3 {
            TensorBoard::create(folder.path()).unwrap();
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3);
    }
}
