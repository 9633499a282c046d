//! In what two checkpoints differ, tensor by tensor.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::format::NamedTensorOwned;
use super::manifest::CheckpointState;
use super::store::Loaded;

const BYTES_PER_VALUE: usize = 4;

/// What differs between two checkpoints.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// Fields of the manifests' states that differ.
    pub fields: Vec<FieldDifference>,
    /// Tensors that differ, by name.
    pub tensors: Vec<TensorDifference>,
    /// Number of tensors that are equal bit by bit.
    pub num_equal: usize,
}

/// A field of the state with another value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FieldDifference {
    /// Its name.
    pub name: String,
    /// Its value in the first checkpoint.
    pub first: String,
    /// Its value in the second one.
    pub second: String,
}

/// A tensor that differs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TensorDifference {
    /// Its name.
    pub name: String,
    /// How it differs.
    pub kind: TensorDifferenceKind,
}

/// How a tensor differs.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TensorDifferenceKind {
    /// Only the first checkpoint has it.
    OnlyFirst,
    /// Only the second checkpoint has it.
    OnlySecond,
    /// It has another shape.
    Shape {
        /// Shape in the first checkpoint.
        first: Vec<usize>,
        /// Shape in the second one.
        second: Vec<usize>,
    },
    /// It has other values.
    Values(ValueDifference),
}

/// How far values are apart.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ValueDifference {
    /// Number of values whose bits differ.
    pub num_different: usize,
    /// Number of all values.
    pub num_values: usize,
    /// Largest absolute difference; `None` where one of the values that differ is not finite.
    pub max_absolute: Option<f64>,
    /// The same, divided by the largest magnitude in the first tensor; `None` where that is zero, too.
    pub relative: Option<f64>,
}

impl fmt::Display for TensorDifferenceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OnlyFirst => f.write_str("only in the first"),
            Self::OnlySecond => f.write_str("only in the second"),
            Self::Shape { first, second } => write!(f, "shape {first:?} and {second:?}"),
            Self::Values(values) => write!(f, "{values}"),
        }
    }
}

impl fmt::Display for ValueDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} values differ", self.num_different, self.num_values)?;
        match (self.max_absolute, self.relative) {
            (None, _) => write!(f, ", some of which are not finite"),
            (Some(absolute), None) => write!(f, " by up to {absolute}"),
            (Some(absolute), Some(relative)) => write!(f, " by up to {absolute} ({relative:.3e} of the largest value)"),
        }
    }
}

impl Difference {
    /// Whether the tensors are equal bit by bit.
    pub fn has_equal_tensors(&self) -> bool {
        self.tensors.is_empty()
    }
}

/// Compares two checkpoints.
pub fn difference(first: &Loaded, second: &Loaded) -> Difference {
    let mut tensors: BTreeMap<&str, (Option<&NamedTensorOwned>, Option<&NamedTensorOwned>)> = BTreeMap::new();
    for tensor in first.model.iter().chain(&first.optimizer) {
        tensors.entry(&tensor.name).or_default().0 = Some(tensor);
    }
    for tensor in second.model.iter().chain(&second.optimizer) {
        tensors.entry(&tensor.name).or_default().1 = Some(tensor);
    }
    let num_tensors = tensors.len();
    let tensors: Vec<TensorDifference> = tensors
        .into_iter()
        .filter_map(|(name, (first, second))| Some(TensorDifference { name: name.to_owned(), kind: compare(first, second)? }))
        .collect();
    Difference { fields: fields(&first.state, &second.state), num_equal: num_tensors - tensors.len(), tensors }
}

fn compare(first: Option<&NamedTensorOwned>, second: Option<&NamedTensorOwned>) -> Option<TensorDifferenceKind> {
    match (first, second) {
        (None, None) => None,
        (Some(_), None) => Some(TensorDifferenceKind::OnlyFirst),
        (None, Some(_)) => Some(TensorDifferenceKind::OnlySecond),
        (Some(first), Some(second)) if first.shape != second.shape => {
            Some(TensorDifferenceKind::Shape { first: first.shape.clone(), second: second.shape.clone() })
        }
        (Some(first), Some(second)) if first.data == second.data => None,
        (Some(first), Some(second)) => Some(TensorDifferenceKind::Values(compare_values(&first.data, &second.data))),
    }
}

fn compare_values(first: &[u8], second: &[u8]) -> ValueDifference {
    let (first, _) = first.as_chunks::<BYTES_PER_VALUE>();
    let (second, _) = second.as_chunks::<BYTES_PER_VALUE>();
    let (mut num_different, mut largest, mut magnitude, mut is_finite) = (0, 0.0_f64, 0.0_f64, true);
    for (a_bytes, b_bytes) in first.iter().zip(second) {
        let (a, b) = (f64::from(f32::from_le_bytes(*a_bytes)), f64::from(f32::from_le_bytes(*b_bytes)));
        if a.is_finite() {
            magnitude = magnitude.max(a.abs());
        }
        if a_bytes != b_bytes {
            num_different += 1;
            is_finite &= a.is_finite() && b.is_finite();
            largest = largest.max((a - b).abs());
        }
    }
    let max_absolute = is_finite.then_some(largest);
    let relative = max_absolute.filter(|_| magnitude > 0.0).map(|largest| largest / magnitude);
    ValueDifference { num_different, num_values: first.len(), max_absolute, relative }
}

fn fields(first: &CheckpointState, second: &CheckpointState) -> Vec<FieldDifference> {
    let texts = |state: &CheckpointState| {
        [
            ("step", state.step.to_string()),
            ("recipe_hash", state.recipe_hash.clone()),
            ("data_fingerprint", state.data_fingerprint.clone()),
            ("world_size", state.world_size.to_string()),
            ("adam_step", state.adam_step.to_string()),
            ("loss", state.loss.map_or_else(|| "unknown".to_owned(), |loss| loss.to_string())),
            ("temporary", state.temporary.to_string()),
            ("shard", state.shard.clone()),
        ]
    };
    let pairs = texts(first).into_iter().zip(texts(second));
    let differing = pairs.filter(|((_, first), (_, second))| first != second);
    differing.map(|((name, first), (_, second))| FieldDifference { name: name.to_owned(), first, second }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, values: &[f32]) -> NamedTensorOwned {
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        NamedTensorOwned { name: name.to_owned(), shape: vec![values.len()], data }
    }

    fn loaded(step: u64, model: Vec<NamedTensorOwned>, optimizer: Vec<NamedTensorOwned>) -> Loaded {
        let state = CheckpointState {
            step,
            recipe_hash: "r".to_owned(),
            data_fingerprint: "d".to_owned(),
            world_size: 1,
            adam_step: 3,
            loss: None,
            temporary: false,
            shard: "none".to_owned(),
        };
        Loaded { state, model, optimizer, url: String::new(), skipped: Vec::new() }
    }

    #[test]
    fn every_kind_of_difference_is_told() {
        let same = tensor("same", &[f32::NAN]);
        let model = vec![tensor("gone", &[1.0]), same.clone(), tensor("w", &[4.0, -8.0, 1.0])];
        let first = loaded(1, model, vec![tensor("m", &[0.0])]);
        let model = vec![tensor("new", &[1.0]), same, tensor("w", &[4.0, -6.0, 0.5])];
        let second = loaded(2, model, vec![tensor("m", &[0.0, 1.0])]);
        let found = difference(&first, &second);
        assert_eq!((found.num_equal, found.has_equal_tensors()), (1, false));
        assert_eq!(found.fields, [FieldDifference { name: "step".to_owned(), first: "1".to_owned(), second: "2".to_owned() }]);
        let values = ValueDifference { num_different: 2, num_values: 3, max_absolute: Some(2.0), relative: Some(0.25) };
        let expected = [
            ("gone", TensorDifferenceKind::OnlyFirst),
            ("m", TensorDifferenceKind::Shape { first: vec![1], second: vec![2] }),
            ("new", TensorDifferenceKind::OnlySecond),
            ("w", TensorDifferenceKind::Values(values)),
        ];
        let found: Vec<_> = found.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.kind.clone())).collect();
        assert_eq!(found, expected);
        assert!(difference(&first, &first).has_equal_tensors());
    }

    #[test]
    fn values_that_are_not_finite_have_no_distance() {
        let bytes = |values: &[f32]| tensor("w", values).data;
        let different = |first: &[f32], second: &[f32]| compare_values(&bytes(first), &bytes(second));
        assert_eq!(different(&[1.0, f32::INFINITY], &[2.0, 0.0]).max_absolute, None);
        let from_zero = different(&[0.0], &[0.5]);
        assert_eq!((from_zero.max_absolute, from_zero.relative), (Some(0.5), None));
        assert_eq!(different(&[0.0], &[-0.0]).num_different, 1);
    }
}
