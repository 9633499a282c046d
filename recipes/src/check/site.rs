//! The cluster file: what its kind needs, and nothing that a script or a command line would take for something else.

use super::{Context, job};
use crate::job_time::{JOB_START_S, least_minutes};
use crate::raw::{PreflightRaw, SiteKindRaw, SiteRaw, SlurmRaw, SshRaw};
use crate::site::{Preflight, Site, SiteKind, SlurmSite, SshSite};
use crate::tree::shortened;

/// Options of `sbatch` that have a key of their own, and that key.
const OWN_KEYS: [(&str, &str); 14] = [
    ("--partition", "slurm.partition"),
    ("--account", "slurm.account"),
    ("--qos", "slurm.qos"),
    ("--constraint", "slurm.constraint"),
    ("--exclude", "slurm.exclude"),
    ("--time", "slurm.time_limit_minutes, or resources.time_limit_minutes of the recipe"),
    ("--nodes", "resources.nodes of the recipe"),
    ("--ntasks-per-node", "resources.workers_per_node of the recipe"),
    ("--cpus-per-task", "resources.cpus_per_worker of the recipe"),
    ("--mem", "resources.memory_per_node_mib of the recipe"),
    ("--gres", "resources.gpus_per_node of the recipe"),
    ("--gpus-per-node", "resources.gpus_per_node of the recipe"),
    ("--container-image", "container.image"),
    ("--container-mounts", "container.mounts"),
];
/// Options of `sbatch` by which runs are watched.
const OWN_OPTIONS: [&str; 9] =
    ["--array", "--dependency", "--error", "--job-name", "--no-requeue", "--open-mode", "--output", "--requeue", "--signal"];

/// Checks a cluster file whose form is right.
pub(super) fn check(context: &mut Context<'_>, raw: SiteRaw) -> Site {
    context.name("name", &raw.name);
    let folder = raw.folder.as_ref().map(|folder| context.path("folder", folder));
    job::modules(context, &raw.modules);
    job::environment(context, &raw.environment);
    job::setup(context, &raw.setup);
    let container = raw.container.map(|raw| job::container(context, raw));
    let kind = kind(context, raw.kind, raw.ssh, raw.slurm);
    Site {
        name: raw.name,
        kind,
        folder,
        container,
        modules: raw.modules,
        environment: raw.environment,
        setup: raw.setup,
        preflight: preflight(&raw.preflight),
        gpu_memory_mib: raw.gpu_memory_mib,
        tokens_per_second: raw.tokens_per_second,
    }
}

pub(crate) fn preflight(raw: &PreflightRaw) -> Preflight {
    Preflight {
        enabled: raw.enabled,
        min_bandwidth_share: raw.min_bandwidth_share,
        max_slowdown: raw.max_slowdown,
        timeout_s: raw.timeout_s,
    }
}

/// The section of the kind; one of another kind is refused.
fn kind(context: &mut Context<'_>, kind: SiteKindRaw, ssh: Option<SshRaw>, slurm: Option<SlurmRaw>) -> SiteKind {
    for (name, stated, fits) in [("ssh", ssh.is_some(), kind == SiteKindRaw::Ssh), ("slurm", slurm.is_some(), kind == SiteKindRaw::Slurm)] {
        if stated && !fits {
            context.problem(name, format!("found this section with another kind, expected `kind: {name}`"));
        }
    }
    match kind {
        SiteKindRaw::Local => SiteKind::Local,
        SiteKindRaw::Slurm => SiteKind::Slurm(slurm_site(context, slurm.unwrap_or_default())),
        SiteKindRaw::Ssh => match ssh {
            Some(raw) => SiteKind::Ssh(ssh_site(context, raw)),
            None => {
                context.problem("kind", "found `ssh` without hosts, expected them in `ssh.hosts`");
                SiteKind::Local
            }
        },
    }
}

fn ssh_site(context: &mut Context<'_>, raw: SshRaw) -> SshSite {
    job::entries(context, &["ssh", "command"], raw.command.len());
    for (index, host) in raw.hosts.iter().enumerate() {
        let keys = ["ssh", "hosts", &index.to_string()];
        let allowed = |character: char| character.is_ascii_alphanumeric() || "._-@:[]".contains(character);
        if host.starts_with('-') || !host.chars().all(allowed) {
            context.mismatch_in(&keys, format!("`{}`", shortened(host)), "the name or address of a host");
        } else if raw.hosts[..index].contains(host) {
            context.mismatch_in(&keys, format!("`{}` a second time", shortened(host)), "hosts that differ");
        }
    }
    for (index, word) in raw.command.iter().enumerate() {
        job::text(context, &["ssh", "command", &index.to_string()], word);
    }
    SshSite { hosts: raw.hosts, command: raw.command, lost_after_s: raw.lost_after_s }
}

fn slurm_site(context: &mut Context<'_>, raw: SlurmRaw) -> SlurmSite {
    let words = [
        ("partition", &raw.partition),
        ("account", &raw.account),
        ("qos", &raw.qos),
        ("constraint", &raw.constraint),
        ("gpu_type", &raw.gpu_type),
    ];
    for (key, word) in words.into_iter().filter_map(|(key, word)| word.as_ref().map(|word| (key, word))) {
        job::word(context, &["slurm", key], word);
    }
    job::entries(context, &["slurm", "options"], raw.options.len());
    for (index, node) in raw.exclude.iter().enumerate() {
        job::word(context, &["slurm", "exclude", &index.to_string()], node);
    }
    for (index, option) in raw.options.iter().enumerate() {
        check_option(context, &["slurm", "options", &index.to_string()], option);
    }
    let least = least_minutes(raw.warning_s);
    if let Some(minutes) = raw.time_limit_minutes.filter(|minutes| *minutes < least) {
        let expected = format!("at least {least}: slurm.warning_s is {} s, and a job starts in {JOB_START_S} s or more", raw.warning_s);
        context.mismatch("slurm.time_limit_minutes", minutes, expected);
    }
    SlurmSite {
        partition: raw.partition,
        account: raw.account,
        qos: raw.qos,
        constraint: raw.constraint,
        exclude: raw.exclude,
        gpu_type: raw.gpu_type,
        options: raw.options,
        time_limit_minutes: raw.time_limit_minutes,
        warning_s: raw.warning_s,
        max_jobs: raw.max_jobs,
        poll_s: raw.poll_s,
    }
}

/// An option in its long form, on one line, that takes nothing from the recipe or from the watching of runs.
fn check_option(context: &mut Context<'_>, keys: &[&str], option: &str) {
    job::text(context, keys, option);
    let found = format!("`{}`", shortened(option));
    let name = option.split(['=', ' ']).next().unwrap_or("");
    if !option.starts_with("--") || name.len() == 2 {
        context.mismatch_in(keys, found, "an option of `sbatch` in its long form, such as `--reservation=NAME`");
    } else if let Some((_, key)) = OWN_KEYS.iter().find(|(own, _)| *own == name) {
        context.mismatch_in(keys, found, format!("this in {key}"));
    } else if OWN_OPTIONS.contains(&name) {
        context.mismatch_in(keys, found, "an option other than those by which runs are watched");
    }
}
