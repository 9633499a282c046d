//! A flat buffer in pieces that each have a memory of their own, which is given back while nobody needs it.

use std::ops::Range;

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};

use crate::torch::memory;

/// One parameter of the buffer.
#[derive(Clone, Copy, Debug)]
pub struct Shape<'a> {
    /// First number in the flat buffer.
    pub offset: usize,
    /// Numbers without padding.
    pub length: usize,
    /// Extents.
    pub extents: &'a [i64],
}

/// The pieces, and a view of each parameter. The views are made once, because a view cannot be made of memory that is not there.
#[derive(Debug)]
pub struct Pieces {
    pieces: Vec<Tensor>,
    views: Vec<Tensor>,
}

impl Pieces {
    /// Pieces of these ranges without memory. Each parameter lies inside one of them.
    pub fn new(ranges: &[Range<usize>], parameters: &[Shape], options: (Kind, Device)) -> Result<Self> {
        let mut views: Vec<Option<Tensor>> = parameters.iter().map(|_| None).collect();
        let mut pieces = Vec::with_capacity(ranges.len());
        for range in ranges {
            let piece = Tensor::f_empty([range.len() as i64], options)?;
            for (view, parameter) in views.iter_mut().zip(parameters) {
                if range.contains(&parameter.offset) {
                    let flat = piece.f_narrow(0, (parameter.offset - range.start) as i64, parameter.length as i64)?;
                    *view = Some(flat.f_view(parameter.extents)?);
                }
            }
            memory::give_back(&piece)?;
            pieces.push(piece);
        }
        let views: Option<Vec<Tensor>> = views.into_iter().collect();
        let views = views.context("find the piece of every parameter")?;
        Ok(Self { pieces, views })
    }

    /// A parameter, by its place in the list that the pieces were made for.
    pub fn view(&self, parameter: usize) -> Tensor {
        self.views[parameter].shallow_clone()
    }

    /// All pieces.
    pub fn all(&self) -> Vec<Tensor> {
        self.pieces.iter().map(Tensor::shallow_clone).collect()
    }
}
