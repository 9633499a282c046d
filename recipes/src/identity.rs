//! What a recipe means, as a hash, and the keys that do not count.

use serde_json::Value;

use crate::raw::{CheckpointRaw, ClusterRaw, defaults};
use crate::recipe::{CheckpointRecipe, Recipe, TrainRecipe};

/// The keys that say how a run is operated and not what it computes, as messages name them.
pub const OPERATIONAL_KEYS: &str = "`cluster`, `checkpoint` but for its place, `train.shard`, `train.replicate_shards`, `train.threads`, `train.log_every_steps`, \
     `train.audit_samples`";

/// Whether a key, or all keys below it, say how a run is operated. Of `checkpoint` as a whole that cannot be told by its name.
pub fn is_operational(key: &str) -> bool {
    const TRAIN: [&str; 5] = ["train.shard", "train.replicate_shards", "train.threads", "train.log_every_steps", "train.audit_samples"];
    let (section, rest) = key.split_once('.').unwrap_or((key, ""));
    let is_place = ["url", "options"].contains(&rest.split('.').next().unwrap_or_default());
    section == "cluster" || (section == "checkpoint" && !is_place) || TRAIN.contains(&key)
}

impl Recipe {
    /// Names what the recipe means: 64 hexadecimal digits of blake3 over its JSON with sorted keys and no spaces, the
    /// [`OPERATIONAL_KEYS`] at their defaults.
    ///
    /// Comments, key order, defaults spelled out or not, and the split into files do not change it; a path does. How a run is operated
    /// does not change what it means, as little as the number of its workers does.
    pub fn hash(&self) -> String {
        self.meaning().full_hash()
    }

    /// The same with every key as it is: what the workers of one generation must agree on.
    pub fn full_hash(&self) -> String {
        let mut value = self.json();
        value.sort_all_objects();
        blake3::hash(value.to_string().as_bytes()).to_hex().to_string()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::to_value(self).expect("a checked recipe has string keys, finite numbers and paths in UTF-8")
    }

    /// This recipe, operated as one that says nothing of how. Places count: elsewhere there are no checkpoints of it.
    fn meaning(&self) -> Self {
        let CheckpointRaw { every_steps, every_seconds, keep_last, keep_best, keep_every_steps, upload_timeout_s, stop_timeout_s, .. } =
            CheckpointRaw::default();
        let checkpoint = CheckpointRecipe {
            url: self.checkpoint.url.clone(),
            options: self.checkpoint.options.clone(),
            every_steps,
            every_seconds,
            keep_last,
            keep_best,
            keep_every_steps,
            cache: None,
            upload_timeout_s,
            stop_timeout_s,
        };
        let train = TrainRecipe {
            shard: defaults::shard(),
            replicate_shards: false,
            threads: 0,
            log_every_steps: defaults::log_every_steps(),
            audit_samples: false,
            ..self.train.clone()
        };
        Self { train, checkpoint, cluster: (&ClusterRaw::default()).into(), ..self.clone() }
    }
}
