//! `cloze-worker preflight`: does every device of this machine compute rightly, and how fast?
//!
//! Products of small whole numbers have a known result that float32 holds exactly; in bfloat16 only the last rounding is allowed.

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use cloze_launcher::preflight::DeviceMeasurement;
use cloze_recipes::failure::Failure;
use tch::{Device, Kind, Tensor};

use crate::torch::cuda;

/// Rows and columns of the product whose result is compared. Its largest entry is 512 · 3 · 4, far below the 2^24 that float32 counts to.
const CHECK_SIZE: i64 = 512;
/// Rows and columns of the product that is timed: on a CPU about a gigaflop, on a GPU enough to fill it.
const TIMED_SIZE_CPU: i64 = 768;
const TIMED_SIZE_CUDA: i64 = 8192;
/// Products before the clock starts, and timed ones, of which the fastest counts.
const WARMUP_PRODUCTS: usize = 2;
const TIMED_PRODUCTS: usize = 5;
/// Half a unit in the last of bfloat16's 8 places, relative to the result.
const BFLOAT16_TOLERANCE: f64 = 1.0 / 256.0;

/// What is checked.
#[derive(Debug)]
pub struct PreflightOptions {
    /// `cpu` or `cuda`
    pub device: String,
    /// Devices, from 0; a CPU counts as one.
    pub num_devices: u32,
    /// Products in bfloat16 too.
    pub bfloat16: bool,
    /// Another torch folder than the one of the build.
    pub torch_folder: Option<PathBuf>,
}

/// Checks every device and prints a JSON list. A device that fails is part of the list.
pub fn preflight(options: &PreflightOptions, stdout: &mut dyn Write) -> Result<()> {
    let measured: Vec<DeviceMeasurement> = if options.device == "cuda" {
        (0..options.num_devices as usize).map(|index| gpu(index, options)).collect()
    } else {
        vec![measurement("cpu".to_owned(), check(Device::Cpu, false))]
    };
    writeln!(stdout, "{}", serde_json::to_string(&measured).context("encode the measurements")?).context("print the measurements")
}

fn gpu(index: usize, options: &PreflightOptions) -> DeviceMeasurement {
    let name = format!("cuda:{index}");
    match cuda::open(index, options.torch_folder.as_deref()) {
        Ok(device) => measurement(name, check(device, options.bfloat16)),
        Err(failure) => DeviceMeasurement { device: name, error: Some(one_line(&failure)), seconds: None, gflops: None },
    }
}

fn one_line(failure: &Failure) -> String {
    let parts = [Some(failure.what.as_str()), failure.place.as_deref(), failure.found.as_deref(), failure.cause.as_deref()];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

fn measurement(device: String, outcome: Result<Timed>) -> DeviceMeasurement {
    match outcome {
        Ok(Timed { wrong: Some(wrong), .. }) => DeviceMeasurement { device, error: Some(wrong), seconds: None, gflops: None },
        Ok(Timed { seconds, gflops, .. }) => DeviceMeasurement { device, error: None, seconds: Some(seconds), gflops: Some(gflops) },
        Err(error) => DeviceMeasurement { device, error: Some(format!("{error:#}")), seconds: None, gflops: None },
    }
}

/// One device's results.
struct Timed {
    /// The first product that is not as it must be.
    wrong: Option<String>,
    seconds: f64,
    gflops: f64,
}

fn check(device: Device, bfloat16: bool) -> Result<Timed> {
    let mut wrong = compare(device, Kind::Float, 0.0)?;
    if bfloat16 && wrong.is_none() {
        wrong = compare(device, Kind::BFloat16, BFLOAT16_TOLERANCE)?;
    }
    let (size, kind) = match device {
        Device::Cuda(_) => (TIMED_SIZE_CUDA, if bfloat16 { Kind::BFloat16 } else { Kind::Float }),
        _ => (TIMED_SIZE_CPU, Kind::Float),
    };
    let seconds = fastest_product(device, kind, size)?;
    Ok(Timed { wrong, seconds, gflops: 2.0 * (size as f64).powi(3) / seconds / 1e9 })
}

/// What the entries of both factors are: small, and different in every row and column.
fn left(row: i64, column: i64) -> i64 {
    (3 * row + column) % 4
}

fn right(row: i64, column: i64) -> i64 {
    (row + 2 * column) % 5
}

/// The difference between a product on the device and the integers' one, where it is larger than allowed; relative to the entry.
fn compare(device: Device, kind: Kind, tolerance: f64) -> Result<Option<String>> {
    let size = CHECK_SIZE;
    let factor = |entry: fn(i64, i64) -> i64| -> Result<Tensor> {
        let values: Vec<f32> = (0..size * size).map(|place| entry(place / size, place % size) as f32).collect();
        Ok(Tensor::from_slice(&values).f_view([size, size])?.f_to_device(device)?.f_to_kind(kind)?)
    };
    let product = factor(left)?.f_matmul(&factor(right)?)?.f_to_kind(Kind::Double)?.f_to_device(Device::Cpu)?.f_reshape([-1])?;
    let found: Vec<f64> = product.try_into().context("read a product")?;
    let expected = expected_product();
    // What is not a number is near nothing.
    let is_near = |found: f64, expected: i64| (found - expected as f64).abs() <= tolerance * expected as f64;
    let is_wrong = |(found, expected): &(&f64, &i64)| !is_near(**found, **expected);
    let num_wrong = found.iter().zip(&expected).filter(is_wrong).count();
    Ok(found.iter().zip(&expected).find(is_wrong).map(|(found, expected)| {
        format!("wrong product in {kind:?}: {num_wrong} of {} entries, for one {found} instead of {expected}", size * size)
    }))
}

/// The product in whole numbers, row by row.
fn expected_product() -> Vec<i64> {
    let size = CHECK_SIZE as usize;
    let mut product = vec![0; size * size];
    for row in 0..size {
        for inner in 0..size {
            let factor = left(row as i64, inner as i64);
            for column in 0..size {
                product[row * size + column] += factor * right(inner as i64, column as i64);
            }
        }
    }
    product
}

fn fastest_product(device: Device, kind: Kind, size: i64) -> Result<f64> {
    let factor = Tensor::f_ones([size, size], (Kind::Float, device))?.f_to_kind(kind)?;
    let mut fastest = f64::INFINITY;
    for number in 0..WARMUP_PRODUCTS + TIMED_PRODUCTS {
        cuda::synchronize(device)?;
        let started = Instant::now();
        let product = factor.f_matmul(&factor)?;
        cuda::synchronize(device)?;
        if number >= WARMUP_PRODUCTS {
            fastest = fastest.min(started.elapsed().as_secs_f64());
        }
        drop(product);
    }
    Ok(fastest.max(f64::MIN_POSITIVE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_computes_rightly() {
        let mut output = Vec::new();
        let options = PreflightOptions { device: "cpu".into(), num_devices: 1, bfloat16: false, torch_folder: None };
        preflight(&options, &mut output).unwrap();
        let measured: Vec<DeviceMeasurement> = serde_json::from_slice(&output).unwrap();
        assert_eq!((measured.len(), measured[0].device.as_str(), &measured[0].error), (1, "cpu", &None));
        assert!(measured[0].seconds.unwrap() > 0.0 && measured[0].gflops.unwrap() > 0.1, "{measured:?}");
    }

    #[test]
    fn the_rounding_of_bfloat16_is_allowed_and_no_more() {
        // The CPU knows bfloat16 too, though no run uses it.
        assert_eq!(compare(Device::Cpu, Kind::BFloat16, BFLOAT16_TOLERANCE).unwrap(), None);
        let wrong = compare(Device::Cpu, Kind::BFloat16, 0.0).unwrap().unwrap();
        assert!(wrong.starts_with("wrong product in BFloat16: "), "{wrong}");
    }

    #[test]
    fn the_expected_product_is_one() {
        let (row, column) = (7, 11);
        let entry: i64 = (0..CHECK_SIZE).map(|inner| left(row, inner) * right(inner, column)).sum();
        assert_eq!(expected_product()[(row * CHECK_SIZE + column) as usize], entry);
    }
}
