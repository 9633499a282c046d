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

/// Environment variable with the number of cores that the workers of a run share on this machine, where other runs have the rest.
pub const CORES_VARIABLE: &str = "CLOZE_CORES";

/// Sets the CPU threads of this process: those asked for, or an even share of the run's cores, which are all that there are unless
/// somebody says otherwise.
pub fn set_threads(wanted: u32, run_cores: Option<u32>, local_workers: u32) {
    let all_cores = std::thread::available_parallelism().map_or(1, usize::from) as u32;
    let cores = run_cores.map_or(all_cores, |cores| cores.min(all_cores));
    let threads = if wanted > 0 { wanted } else { (cores / local_workers.max(1)).max(1) };
    tch::set_num_threads(threads as i32);
}
