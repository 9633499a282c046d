//! Tensors to `safetensors` bytes and back; in memory every tensor is little-endian `f32`.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use safetensors::{Dtype, SafeTensors, View};

const BYTES_PER_VALUE: usize = 4;

/// A tensor in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedTensorOwned {
    /// Name in its file, unique there.
    pub name: String,
    /// Extent of each dimension; empty for a single value.
    pub shape: Vec<usize>,
    /// The values in row-major order, little-endian `f32`.
    pub data: Bytes,
}

impl View for &NamedTensorOwned {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.data)
    }

    fn data_len(&self) -> usize {
        self.data.len()
    }
}

/// The bytes of a file with these tensors, marked as `PyTorch` layout, which `transformers` insists on.
///
/// Fails when a name occurs twice or the values do not fill the shape: both would write a file that cannot be read.
pub fn encode(tensors: &[NamedTensorOwned]) -> anyhow::Result<Bytes> {
    let mut names = BTreeSet::new();
    for tensor in tensors {
        ensure!(names.insert(tensor.name.as_str()), "tensor `{}` occurs twice", tensor.name);
        let expected = tensor.shape.iter().product::<usize>() * BYTES_PER_VALUE;
        ensure!(
            tensor.data.len() == expected,
            "tensor `{}` of shape {:?} has {} bytes instead of {expected}",
            tensor.name,
            tensor.shape,
            tensor.data.len()
        );
    }
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let bytes = safetensors::serialize(tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)), Some(metadata));
    Ok(bytes.context("serialise tensors")?.into())
}

/// The tensors of a file in the order of their names; half and bfloat16 values become `f32`, exactly.
///
/// Fails when the header does not describe the bytes, and on other data types.
pub fn decode(bytes: &Bytes) -> anyhow::Result<Vec<NamedTensorOwned>> {
    let file = SafeTensors::deserialize(bytes)?;
    let mut tensors = Vec::with_capacity(file.len());
    for (name, tensor) in file.iter() {
        let data = match tensor.dtype() {
            Dtype::F32 => bytes.slice_ref(tensor.data()),
            Dtype::F16 => widen(tensor.data(), half_to_f32),
            Dtype::BF16 => widen(tensor.data(), bfloat16_to_f32),
            other => bail!("tensor `{name}` has data type {other}; F32, F16 and BF16 can be read"),
        };
        tensors.push(NamedTensorOwned { name: name.to_owned(), shape: tensor.shape().to_vec(), data });
    }
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(tensors)
}

/// Turns 16-bit values into the bytes of `f32` values.
fn widen(data: &[u8], to_f32: impl Fn(u16) -> f32) -> Bytes {
    let (halves, _) = data.as_chunks::<2>();
    let mut wide = vec![0; halves.len() * BYTES_PER_VALUE];
    let (values, _) = wide.as_chunks_mut::<BYTES_PER_VALUE>();
    for (value, half) in values.iter_mut().zip(halves) {
        *value = to_f32(u16::from_le_bytes(*half)).to_le_bytes();
    }
    wide.into()
}

/// A bfloat16 is the upper half of an `f32`.
fn bfloat16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// IEEE half precision: 1 sign bit, 5 exponent bits (bias 15), 10 mantissa bits.
fn half_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let exponent = u32::from(bits >> 10) & 0x1f;
    let mantissa = u32::from(bits) & 0x3ff;
    let magnitude = match exponent {
        // Subnormal: the mantissa counts steps of 2^-24, and the product is exact.
        0 => (mantissa as f32 / 16_777_216.0).to_bits(),
        // Infinity and not-a-number keep their payload.
        31 => 0x7f80_0000 | (mantissa << 13),
        // The bias of an `f32` is 127, which is 112 more.
        _ => ((exponent + 112) << 23) | (mantissa << 13),
    };
    f32::from_bits(sign | magnitude)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, shape: &[usize], data: &[u8]) -> NamedTensorOwned {
        NamedTensorOwned { name: name.to_owned(), shape: shape.to_vec(), data: Bytes::copy_from_slice(data) }
    }

    #[test]
    fn tensors_survive_bit_by_bit() {
        let odd: Vec<u8> =
            [f32::NAN.to_bits() | 5, f32::NEG_INFINITY.to_bits(), 1, (-0.0f32).to_bits()].iter().flat_map(|b| b.to_le_bytes()).collect();
        let one = 1.5f32.to_le_bytes();
        let tensors = [tensor("z.weight", &[2, 2], &odd), tensor("a", &[], &one), tensor("empty", &[0, 3], &[])];
        let read = decode(&encode(&tensors).unwrap()).unwrap();
        let names: Vec<_> = read.iter().map(|tensor| tensor.name.as_str()).collect();
        assert_eq!(names, ["a", "empty", "z.weight"]);
        assert_eq!((read[2].shape.as_slice(), read[2].data.as_ref()), ([2, 2].as_slice(), odd.as_slice()));
        assert_eq!(read[0].data.as_ref(), one);
    }

    #[test]
    fn what_cannot_be_read_back_is_not_written() {
        let (two, three) = (tensor("a", &[2], &[0; 8]), tensor("a", &[3], &[0; 8]));
        assert!(encode(&[two.clone(), two]).unwrap_err().to_string().contains("twice"));
        assert!(encode(&[three]).unwrap_err().to_string().contains("instead of 12"));
    }

    #[test]
    fn damaged_bytes_are_errors() {
        let good = encode(&[tensor("a", &[2], &[0; 8])]).unwrap();
        for len in 0..good.len() {
            assert!(decode(&good.slice(..len)).is_err(), "{len} of {} bytes are accepted", good.len());
        }
    }

    #[test]
    fn every_half_has_its_value() {
        for bits in 0..=u16::MAX {
            let (sign, exponent, mantissa) = (bits >> 15, i32::from(bits >> 10) & 31, f64::from(bits & 0x3ff));
            let magnitude = match exponent {
                0 => mantissa * 2f64.powi(-24),
                31 if bits.trailing_zeros() >= 10 => f64::INFINITY,
                31 => f64::NAN,
                _ => (1.0 + mantissa / 1024.0) * 2f64.powi(exponent - 15),
            };
            let value = half_to_f32(bits);
            assert_eq!(value.is_sign_negative(), sign == 1);
            assert!(value.is_nan() == magnitude.is_nan());
            assert!(value.is_nan() || f64::from(value.abs()).to_bits() == magnitude.to_bits(), "{bits:#06x}");
        }
    }

    #[test]
    fn bfloat16_is_the_upper_half() {
        for (bits, value) in [(0x3f80, 1.0f32), (0xc000, -2.0), (0x0001, f32::from_bits(0x0001_0000)), (0x7f80, f32::INFINITY)] {
            assert_eq!(bfloat16_to_f32(bits).to_bits(), value.to_bits());
        }
    }
}
