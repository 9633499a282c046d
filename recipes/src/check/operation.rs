//! Running a recipe: checkpoint places and policies, bounds of failure handling.

use super::Context;
use crate::paths;
use crate::raw::{CheckpointRaw, ClusterRaw};
use crate::recipe::{CheckpointRecipe, ClusterRecipe, HangRecipe};

pub(super) fn checkpoint(context: &mut Context<'_>, raw: CheckpointRaw) -> CheckpointRecipe {
    let current_folder = context.current_folder;
    let url = raw.url.map(|url| context.url("checkpoint.url", &url, current_folder));
    context.no_secrets("checkpoint.options", &raw.options);
    if let Some(every) = raw.keep_every_steps.filter(|every| !every.is_multiple_of(raw.every_steps)) {
        let expected = format!("a multiple of checkpoint.every_steps, which is {}", raw.every_steps);
        context.mismatch("checkpoint.keep_every_steps", every, expected);
    }
    CheckpointRecipe {
        url,
        options: raw.options,
        every_steps: raw.every_steps,
        every_seconds: raw.every_seconds,
        keep_last: raw.keep_last,
        keep_best: raw.keep_best,
        keep_every_steps: raw.keep_every_steps,
        cache: raw.cache.map(|cache| paths::resolve(current_folder, &cache)),
        upload_timeout_s: raw.upload_timeout_s,
        stop_timeout_s: raw.stop_timeout_s,
    }
}

impl From<&ClusterRaw> for ClusterRecipe {
    fn from(raw: &ClusterRaw) -> Self {
        Self {
            max_restarts: raw.max_restarts,
            heartbeat_timeout_ms: raw.heartbeat_timeout_ms,
            collective_timeout_ms: raw.collective_timeout_ms,
            min_workers: raw.min_workers,
            replacement_wait_s: raw.replacement_wait_s,
            coordinator_grace_s: raw.coordinator_grace_s,
            hang: HangRecipe {
                init_s: raw.hang.init_s,
                data_s: raw.hang.data_s,
                step_s: raw.hang.step_s,
                checkpoint_s: raw.hang.checkpoint_s,
            },
            exclude_host_after: raw.exclude_host_after,
            retries_per_step: raw.retries_per_step,
            tls: raw.tls,
        }
    }
}
