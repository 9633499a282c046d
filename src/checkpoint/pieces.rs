//! Pieces of tensors, each with its place in the whole: into files without copying them together, and back to whole tensors.
//!
//! A whole tensor is stored under its name and in its shape, as everywhere. A part of one is stored as a row of numbers named
//! `NAME[start:end]`, and the file's metadata says under `slices` where it belongs.

use std::collections::BTreeMap;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::format::{NamedTensorOwned, decode};

const BYTES_PER_VALUE: usize = 4;
/// A header is preceded by its length in this many bytes, and filled up to a multiple of them.
pub const LENGTH_BYTES: usize = 8;
/// Largest header that is read on its own, in bytes: the format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Key of the metadata in a header.
const METADATA_KEY: &str = "__metadata__";
/// Key of the places of parts in the metadata.
const SLICES_KEY: &str = "slices";

/// A range of a tensor's values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Name of the tensor.
    pub name: String,
    /// Extent of each dimension of the whole tensor; empty for a single value.
    pub full_shape: Vec<usize>,
    /// Index of the first value in the tensor's row-major order.
    pub start: usize,
    /// The values, little-endian `f32`.
    pub data: Bytes,
}

impl Piece {
    fn num_values(&self) -> usize {
        self.data.len() / BYTES_PER_VALUE
    }

    fn end(&self) -> usize {
        self.start + self.num_values()
    }

    /// Number of values of the whole tensor; `None` where no memory could hold it.
    fn full_values(&self) -> Option<usize> {
        self.full_shape.iter().try_fold(1_usize, |product, extent| product.checked_mul(*extent))
    }

    fn is_whole(&self) -> bool {
        self.start == 0 && self.full_values() == Some(self.num_values())
    }

    fn stored_name(&self) -> String {
        if self.is_whole() { self.name.clone() } else { format!("{}[{}:{}]", self.name, self.start, self.end()) }
    }

    fn stored_shape(&self) -> Vec<usize> {
        if self.is_whole() { self.full_shape.clone() } else { vec![self.num_values()] }
    }

    fn check(&self) -> anyhow::Result<()> {
        let fits = self.full_values().is_some_and(|values| self.end() <= values);
        ensure!(
            self.data.len().is_multiple_of(BYTES_PER_VALUE) && fits,
            "{} bytes from value {} do not fit tensor `{}` of shape {:?}",
            self.data.len(),
            self.start,
            self.name,
            self.full_shape
        );
        Ok(())
    }
}

/// Where a stored row of numbers belongs.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Slice {
    name: String,
    start: usize,
    shape: Vec<usize>,
}

/// The content of a file with these pieces, as buffers that follow each other; the pieces' values are not copied.
///
/// Fails when a name occurs twice or values do not fit their tensor: both would write a file that cannot be read.
pub fn encode(pieces: &[Piece]) -> anyhow::Result<Vec<Bytes>> {
    let mut by_name: BTreeMap<String, &Piece> = BTreeMap::new();
    let mut slices: BTreeMap<String, Slice> = BTreeMap::new();
    for piece in pieces {
        piece.check()?;
        let name = piece.stored_name();
        if !piece.is_whole() {
            slices.insert(name.clone(), Slice { name: piece.name.clone(), start: piece.start, shape: piece.full_shape.clone() });
        }
        if let Some(other) = by_name.insert(name, piece) {
            bail!("tensor `{}` occurs twice", other.name);
        }
    }
    let mut buffers = vec![header(&by_name, &slices)?];
    buffers.extend(by_name.into_values().map(|piece| piece.data.clone()).filter(|data| !data.is_empty()));
    Ok(buffers)
}

fn header(by_name: &BTreeMap<String, &Piece>, slices: &BTreeMap<String, Slice>) -> anyhow::Result<Bytes> {
    // `transformers` insists on the layout's name.
    let mut metadata = Map::from_iter([("format".to_owned(), Value::from("pt"))]);
    if !slices.is_empty() {
        metadata.insert(SLICES_KEY.to_owned(), serde_json::to_string(slices).context("write the places of slices")?.into());
    }
    let mut header = Map::from_iter([(METADATA_KEY.to_owned(), Value::Object(metadata))]);
    let mut offset = 0;
    for (name, piece) in by_name {
        let end = offset + piece.data.len();
        header.insert(name.clone(), json!({"dtype": "F32", "shape": piece.stored_shape(), "data_offsets": [offset, end]}));
        offset = end;
    }
    let mut text = serde_json::to_vec(&header).context("write a header of tensors")?;
    text.resize(text.len().next_multiple_of(LENGTH_BYTES), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    Ok(bytes.into())
}

/// The pieces in a file, in the order of their stored names.
pub fn decode_pieces(bytes: &Bytes) -> anyhow::Result<Vec<Piece>> {
    let (_, metadata) = SafeTensors::read_metadata(bytes)?;
    let slices = metadata.metadata().as_ref().and_then(|metadata| metadata.get(SLICES_KEY));
    let mut slices: BTreeMap<String, Slice> = match slices {
        Some(text) => serde_json::from_str(text).context("read the places of slices")?,
        None => BTreeMap::new(),
    };
    let mut pieces = Vec::new();
    for NamedTensorOwned { name, shape, data } in decode(bytes)? {
        let piece = match slices.remove(&name) {
            Some(Slice { name, start, shape }) => Piece { name, full_shape: shape, start, data },
            None => Piece { name, full_shape: shape, start: 0, data },
        };
        let end = piece.start.checked_add(piece.num_values());
        let fits = end.is_some_and(|end| piece.full_values().is_some_and(|values| end <= values));
        ensure!(fits, "the slice from value {} does not fit tensor `{}`", piece.start, piece.name);
        pieces.push(piece);
    }
    ensure!(slices.is_empty(), "the metadata names slices that are not there");
    Ok(pieces)
}

/// Puts pieces together to whole tensors, sorted by name. The error says which values are missing or there twice.
pub fn merge(pieces: Vec<Piece>) -> Result<Vec<NamedTensorOwned>, String> {
    let mut by_name: BTreeMap<String, Vec<Piece>> = BTreeMap::new();
    for piece in pieces {
        by_name.entry(piece.name.clone()).or_default().push(piece);
    }
    by_name.into_values().map(merge_tensor).collect()
}

fn merge_tensor(mut pieces: Vec<Piece>) -> Result<NamedTensorOwned, String> {
    if let [piece] = pieces.as_slice()
        && piece.is_whole()
    {
        return Ok(NamedTensorOwned { name: piece.name.clone(), shape: piece.full_shape.clone(), data: piece.data.clone() });
    }
    // Pieces without values come before those that begin at the same place.
    pieces.sort_by_key(|piece| (piece.start, piece.num_values()));
    let Some(first) = pieces.first() else { return Err("a tensor has no pieces".to_owned()) };
    let (name, shape, full_values) = (first.name.clone(), first.full_shape.clone(), first.full_values());
    let mut next = 0;
    for piece in &pieces {
        if piece.full_shape != shape {
            return Err(format!("tensor `{name}` has pieces of shape {shape:?} and of {:?}", piece.full_shape));
        }
        if piece.start > next {
            return Err(format!("tensor `{name}` lacks its values {next} to {}", piece.start));
        }
        if piece.start < next {
            return Err(format!("tensor `{name}` has its values from {} twice", piece.start));
        }
        next = piece.end();
    }
    if full_values != Some(next) {
        return Err(format!("tensor `{name}` of shape {shape:?} lacks its values from {next}"));
    }
    let mut data = Vec::with_capacity(next * BYTES_PER_VALUE);
    for piece in &pieces {
        data.extend_from_slice(&piece.data);
    }
    Ok(NamedTensorOwned { name, shape, data: data.into() })
}

/// What a file's header says, without its values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Names of the tensors as stored.
    pub names: Vec<String>,
    /// Bytes of the values.
    pub bytes: u64,
    /// No tensor is stored in part.
    pub is_whole: bool,
}

/// Length of a header with what precedes it, from a file's first bytes.
pub fn header_end(start: &[u8]) -> anyhow::Result<u64> {
    let length = start.first_chunk::<LENGTH_BYTES>().context("find the length of a header of tensors")?;
    let length = u64::from_le_bytes(*length);
    ensure!(length <= MAX_HEADER_BYTES, "a header of tensors says that it has {length} bytes");
    Ok(LENGTH_BYTES as u64 + length)
}

/// Reads a header, which begins with its length.
pub fn summary(header: &[u8]) -> anyhow::Result<Summary> {
    let text = header.get(LENGTH_BYTES..).context("find a header of tensors")?;
    let header: Map<String, Value> = serde_json::from_slice(text).context("read a header of tensors")?;
    let ends = header.values().filter_map(|entry| entry["data_offsets"][1].as_u64());
    Ok(Summary {
        bytes: ends.max().unwrap_or(0),
        is_whole: header.get(METADATA_KEY).is_none_or(|metadata| metadata.get(SLICES_KEY).is_none()),
        names: header.keys().filter(|name| *name != METADATA_KEY).cloned().collect(),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use safetensors::Dtype;
    use safetensors::tensor::TensorView;

    use super::super::format;
    use super::*;

    fn values(range: std::ops::Range<usize>) -> Bytes {
        range.flat_map(|index| (index as f32).sqrt().to_le_bytes()).collect()
    }

    fn piece(name: &str, shape: &[usize], range: std::ops::Range<usize>) -> Piece {
        Piece { name: name.to_owned(), full_shape: shape.to_vec(), start: range.start, data: values(range) }
    }

    fn file(pieces: &[Piece]) -> Bytes {
        encode(pieces).unwrap().concat().into()
    }

    #[test]
    fn whole_tensors_are_stored_as_everywhere() {
        let tensors = [("z", vec![2, 3]), ("a", vec![]), ("empty", vec![0, 3])];
        let pieces: Vec<Piece> = tensors.iter().map(|(name, shape)| piece(name, shape, 0..shape.iter().product())).collect();
        let named: Vec<NamedTensorOwned> =
            pieces.iter().map(|p| NamedTensorOwned { name: p.name.clone(), shape: p.full_shape.clone(), data: p.data.clone() }).collect();
        assert_eq!(file(&pieces), format::encode(&named).unwrap());
        let merged = merge(decode_pieces(&file(&pieces)).unwrap()).unwrap();
        assert_eq!(merged, format::decode(&file(&pieces)).unwrap());
    }

    #[test]
    fn slices_come_back_as_the_whole() {
        let shape = [3, 4];
        for cuts in [vec![0, 12], vec![0, 5, 12], vec![0, 0, 5, 5, 12, 12]] {
            let files: Vec<Bytes> =
                cuts.windows(2).map(|cut| file(&[piece("w", &shape, cut[0]..cut[1]), piece(&format!("b{}", cut[0]), &[], 0..1)])).collect();
            let pieces: Vec<Piece> = files.iter().rev().flat_map(|file| decode_pieces(file).unwrap()).filter(|p| p.name == "w").collect();
            let merged = merge(pieces).unwrap();
            assert_eq!(merged, [NamedTensorOwned { name: "w".to_owned(), shape: shape.to_vec(), data: values(0..12) }], "{cuts:?}");
        }
    }

    #[test]
    fn gaps_and_overlaps_are_told() {
        let cases: [(&[std::ops::Range<usize>], &str); 5] = [
            (&[0..4, 5..12], "lacks its values 4 to 5"),
            (&[0..4, 3..12], "has its values from 3 twice"),
            (&[0..4, 4..11], "lacks its values from 11"),
            (&[0..0, 1..12], "lacks its values 0 to 1"),
            (&[0..12, 0..12], "has its values from 0 twice"),
        ];
        for (ranges, reason) in cases {
            let error = merge(ranges.iter().map(|range| piece("w", &[3, 4], range.clone())).collect()).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
        let error = merge(vec![piece("w", &[4], 0..2), piece("w", &[2, 2], 2..4)]).unwrap_err();
        assert!(error.contains("pieces of shape"), "{error}");
    }

    #[test]
    fn what_cannot_be_read_back_is_not_written() {
        let ragged = Piece { data: Bytes::from_static(&[0; 7]), ..piece("w", &[3], 0..0) };
        for pieces in [vec![piece("w", &[3], 0..4)], vec![piece("w", &[3], 0..3), piece("w", &[3], 0..3)], vec![ragged]] {
            assert!(encode(&pieces).is_err(), "{pieces:?}");
        }
    }

    #[test]
    fn a_header_tells_names_and_sizes() {
        let whole = file(&[piece("b", &[2], 0..2), piece("a", &[3], 0..3)]);
        let end = header_end(&whole).unwrap();
        let read = summary(&whole[..end as usize]).unwrap();
        assert_eq!(read, Summary { names: vec!["a".to_owned(), "b".to_owned()], bytes: 20, is_whole: true });
        assert_eq!(whole.len() as u64, end + 20);
        let sliced = file(&[piece("b", &[2], 0..1)]);
        assert!(!summary(&sliced[..header_end(&sliced).unwrap() as usize]).unwrap().is_whole);
        assert!(header_end(&[1, 0]).is_err() && header_end(&[255; 8]).is_err() && summary(&whole[..12]).is_err());
    }

    #[test]
    fn a_slice_that_does_not_fit_is_refused() {
        let data = values(3..6);
        let place = |start: usize, shape: &[usize]| json!({"w[3:6]": {"name": "w", "start": start, "shape": shape}}).to_string();
        let cases = [
            (place(3, &[12]), true),
            (place(10, &[12]), false),
            (place(usize::MAX, &[12]), false),
            (place(3, &[usize::MAX, 2]), false),
            (json!({"other": {"name": "w", "start": 0, "shape": [3]}}).to_string(), false),
            ("7".to_owned(), false),
        ];
        for (slices, is_right) in cases {
            let view = TensorView::new(Dtype::F32, vec![3], &data).unwrap();
            let metadata = HashMap::from([(SLICES_KEY.to_owned(), slices.clone())]);
            let file = safetensors::serialize([("w[3:6]", view)], Some(metadata)).unwrap();
            assert_eq!(decode_pieces(&file.into()).is_ok(), is_right, "{slices}");
        }
    }
}
