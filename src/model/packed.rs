//! A pack of documents as tensors: tokens one after another, boundaries, and the labelled positions.
//!
//! Shape legend: T tokens of the pack, B documents, N labelled positions.

use anyhow::{Result, ensure};
use tch::{Device, Tensor};

use crate::torch::memory::to_device;
use crate::torch::ops::Targets;

/// Value of a label that is not scored.
pub const NOT_SCORED: i32 = -100;

/// Documents of a pack on a device.
#[derive(Debug)]
pub struct PackedInput {
    /// Token ids, `[T]` int64.
    pub ids: Tensor,
    /// Position inside the document, `[T]` int64.
    pub positions: Tensor,
    /// Document boundaries, `[B+1]` int32.
    pub cu_lengths: Tensor,
    /// The same on the host.
    pub cu_lengths_host: Vec<i32>,
    /// Longest document, in tokens.
    pub longest: i64,
}

/// Positions of a pack that are scored.
#[derive(Debug)]
pub struct Labelled {
    /// Position in the pack, `[N]` int64.
    pub position: Tensor,
    /// What to predict there and with which weight.
    pub targets: Targets,
}

impl PackedInput {
    /// Copies a pack to a device. `lengths` must add up to the number of tokens and hold no zero.
    pub fn new(ids: &[i32], lengths: &[i32], device: Device) -> Result<Self> {
        let total: i64 = lengths.iter().map(|&n| i64::from(n)).sum();
        ensure!(lengths.iter().all(|&n| n > 0), "a document of a pack is empty");
        ensure!(total == ids.len() as i64, "lengths add up to {total}, but the pack has {} tokens", ids.len());
        let mut cu_lengths_host = vec![0];
        let mut positions = Vec::with_capacity(ids.len());
        for &length in lengths {
            cu_lengths_host.push(cu_lengths_host[cu_lengths_host.len() - 1] + length);
            positions.extend(0..i64::from(length));
        }
        let wide: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
        Ok(Self {
            ids: to_device(Tensor::f_from_slice(&wide)?, device)?,
            positions: to_device(Tensor::f_from_slice(&positions)?, device)?,
            cu_lengths: to_device(Tensor::f_from_slice(&cu_lengths_host)?, device)?,
            cu_lengths_host,
            longest: i64::from(lengths.iter().copied().max().unwrap_or(0)),
        })
    }
}

impl Labelled {
    /// Finds the labelled positions; `weights` has a number for each token of the pack.
    pub fn new(labels: &[i32], weights: &[f32], device: Device) -> Result<Self> {
        ensure!(labels.len() == weights.len(), "{} labels but {} weights", labels.len(), weights.len());
        let positions: Vec<i64> = (0..labels.len()).filter(|&t| labels[t] != NOT_SCORED).map(|t| t as i64).collect();
        let tokens: Vec<i64> = positions.iter().map(|&t| i64::from(labels[t as usize])).collect();
        let chosen: Vec<f32> = positions.iter().map(|&t| weights[t as usize]).collect();
        Ok(Self {
            position: to_device(Tensor::f_from_slice(&positions)?, device)?,
            targets: Targets {
                token: to_device(Tensor::f_from_slice(&tokens)?, device)?,
                weight: to_device(Tensor::f_from_slice(&chosen)?, device)?,
            },
        })
    }
}
