//! From a recipe's device to tensors' devices and threads.

use std::path::Path;

use anyhow::Result;
use cloze_recipes::recipe;
use tch::Device;

use crate::torch::cuda;

/// Opens the device that a recipe asks for; worker n takes GPU n.
pub fn open(wanted: recipe::Device, index: usize, torch_folder: Option<&Path>) -> Result<Device> {
    match wanted {
        recipe::Device::Cpu => Ok(Device::Cpu),
        recipe::Device::Cuda => Ok(cuda::open(index, torch_folder)?),
    }
}

/// Sets the CPU threads of this process: those asked for, or an even share of the machine's cores.
pub fn set_threads(wanted: u32, local_workers: u32) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from) as u32;
    let threads = if wanted > 0 { wanted } else { (cores / local_workers.max(1)).max(1) };
    tch::set_num_threads(threads as i32);
}
