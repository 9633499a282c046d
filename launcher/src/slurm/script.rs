//! The batch script of a job. A pure function of what is wanted, so that it can be shown before anything is submitted.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::site::{Site, SiteKind, SlurmSite};
use cloze_recipes::study::{Container, Resources};

use super::job::JobId;
use super::quote::{directive, shell_line, shell_word, shell_words, variable_name};
use super::version::Version;

/// Exit code of a script whose modules or setup fail: the machine lacks something.
const SETUP_EXIT_CODE: u8 = 5;

/// Longest name of a job; longer ones are cut off by some tables.
const NAME_LENGTH_MAX: usize = 128;

/// One job or an array of jobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobRequest {
    /// Its name, which no other job has.
    pub name: String,
    /// What it executes, program first, all paths absolute.
    pub command: Vec<String>,
    /// Folder in which it starts; absolute.
    pub folder: PathBuf,
    /// Folder of its logs, which must be there when it starts; absolute.
    pub logs: PathBuf,
    /// Elements of an array of jobs; `None` is one job.
    pub array: Option<ArrayRange>,
    /// Jobs that it waits for.
    pub dependency: Option<Dependency>,
    /// Nodes that it must not use, besides those of the site.
    pub exclude: Vec<String>,
    /// Whether it goes on without a node that fails, instead of being put back into the queue.
    pub survives_node_loss: bool,
    /// Whether the command runs in the container; else only the steps that it starts do.
    pub in_container: bool,
}

/// Elements of an array of jobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArrayRange {
    /// Numbers of the elements, as in `0-9` or `3,7`.
    pub elements: String,
    /// Elements that run at the same time, at most; `None` is all of them.
    pub limit: Option<u32>,
}

/// What a job waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dependency {
    /// Starts if that job ends badly, and is taken off the queue if it ends well.
    AfterFailure(JobId),
    /// Starts when that job is over, however it ended.
    AfterEnd(JobId),
}

/// The machines and the site of a job, resolved.
struct Shape<'a> {
    request: &'a JobRequest,
    resources: &'a Resources,
    site: &'a Site,
    slurm: &'a SlurmSite,
    version: Version,
}

/// Writes the batch script. Fails with kind `Recipe` on text that cannot go into one, and where the site has no SLURM.
pub fn render(request: &JobRequest, resources: &Resources, site: &Site, version: Version) -> Result<String, Failure> {
    let SiteKind::Slurm(slurm) = &site.kind else {
        return Err(Failure::new(FailureKind::Recipe, "this site has no SLURM")
            .at(&site.name)
            .hint("set `kind: slurm` in the cluster file"));
    };
    let shape = Shape { request, resources, site, slurm, version };
    let mut script = String::from("#!/bin/bash\n");
    for option in shape.options()? {
        script += &directive(&option)?;
        script.push('\n');
    }
    script += &shape.preparation()?;
    script += &shape.command()?;
    Ok(script)
}

/// The container of a job: the recipe's, or else the site's. Folders that the job itself needs are mounted under their own paths.
pub fn container_options(resources: &Resources, site: &Site, needed: &[&Path]) -> Vec<String> {
    let Some(Container { image, mounts }) = resources.container.as_ref().or(site.container.as_ref()) else { return Vec::new() };
    let own = needed.iter().map(|folder| format!("{0}:{0}", folder.display()));
    let mut all: Vec<String> = mounts.clone();
    for mount in own {
        if !all.contains(&mount) {
            all.push(mount);
        }
    }
    let mut options = vec![format!("--container-image={image}")];
    if !all.is_empty() {
        options.push(format!("--container-mounts={}", all.join(",")));
    }
    options
}

/// Cores of all workers of a node, where the resources state them.
pub fn cpus_per_node(resources: &Resources) -> Option<u32> {
    resources.cpus_per_worker.map(|cpus| cpus.saturating_mul(resources.workers_per_node))
}

impl Shape<'_> {
    fn options(&self) -> Result<Vec<String>, Failure> {
        let Self { request, resources, slurm, .. } = self;
        if request.name.len() > NAME_LENGTH_MAX {
            let failure = Failure::new(FailureKind::Recipe, "the name of a job is too long").found(&request.name);
            return Err(failure.expected(format!("at most {NAME_LENGTH_MAX} bytes")));
        }
        let mut options = vec![format!("--job-name={}", request.name), format!("--chdir={}", path(&request.folder)?)];
        let log = if request.array.is_some() { "job-%A_%a.log" } else { "job-%j.log" };
        options.push(format!("--output={}", path(&request.logs.join(log))?));
        options.push("--open-mode=append".to_owned());
        if let Some(ArrayRange { elements, limit }) = &request.array {
            options.push(limit.map_or_else(|| format!("--array={elements}"), |limit| format!("--array={elements}%{limit}")));
        }
        let named = [("partition", &slurm.partition), ("account", &slurm.account), ("qos", &slurm.qos), ("constraint", &slurm.constraint)];
        options.extend(named.iter().filter_map(|(name, value)| value.as_ref().map(|value| format!("--{name}={value}"))));
        options.push(format!("--nodes={}", resources.nodes));
        options.push("--ntasks-per-node=1".to_owned());
        options.extend(cpus_per_node(resources).map(|cpus| format!("--cpus-per-task={cpus}")));
        options.extend(resources.memory_per_node_mib.map(|memory| format!("--mem={memory}M")));
        options.extend(self.version.dialect().gpus(resources.gpus_per_node, slurm.gpu_type.as_deref()));
        let limit = resources.time_limit_minutes.or(slurm.time_limit_minutes);
        options.extend(limit.map(|minutes| format!("--time={minutes}")));
        options.push(format!("--signal=B:USR2@{}", slurm.warning_s));
        options.push("--requeue".to_owned());
        if request.survives_node_loss {
            options.push("--no-kill".to_owned());
        }
        let mut exclude: Vec<&str> = slurm.exclude.iter().chain(&request.exclude).map(String::as_str).collect();
        exclude.sort_unstable();
        exclude.dedup();
        if !exclude.is_empty() {
            options.push(format!("--exclude={}", exclude.join(",")));
        }
        match request.dependency {
            None => {}
            Some(Dependency::AfterFailure(job)) => options.extend(self.version.dialect().after_failure(job)),
            Some(Dependency::AfterEnd(job)) => options.push(format!("--dependency=afterany:{job}")),
        }
        // Last, so that a site can say otherwise.
        options.extend(slurm.options.iter().cloned());
        Ok(options)
    }

    /// Modules, variables and setup: the site's first, then the recipe's.
    fn preparation(&self) -> Result<String, Failure> {
        let Self { resources, site, .. } = self;
        let mut lines = String::new();
        let modules: Vec<&String> = site.modules.iter().chain(&resources.modules).collect();
        let setup: Vec<&String> = site.setup.iter().chain(&resources.setup).collect();
        if !modules.is_empty() || !setup.is_empty() {
            let say = "echo \"error: the setup of the job failed: $1\" >&2";
            // Writing to a String cannot fail.
            let _ = writeln!(lines, "\nfail() {{ {say}; exit {SETUP_EXIT_CODE}; }}");
        }
        for module in modules {
            let word = shell_word(module)?;
            let _ = writeln!(lines, "module load {word} || fail {}", shell_word(&format!("module load {module}"))?);
        }
        let mut variables: BTreeMap<&String, &String> = site.environment.iter().collect();
        variables.extend(&resources.environment);
        if !variables.is_empty() {
            lines.push('\n');
        }
        for (name, value) in variables {
            let _ = writeln!(lines, "export {}={}", variable_name(name)?, shell_word(value)?);
        }
        for line in setup {
            // In braces, so that a line of several commands fails as a whole; the line break lets a comment end.
            let _ = writeln!(lines, "{{ {}\n}} || fail {}", shell_line(line)?, shell_word(line)?);
        }
        Ok(lines)
    }

    /// The last line. `exec` puts the command in the place of the shell, which would not pass signals on.
    fn command(&self) -> Result<String, Failure> {
        let Self { request, resources, site, .. } = self;
        let mut words = Vec::new();
        let container = container_options(resources, site, &[&request.folder]);
        if request.in_container && !container.is_empty() {
            words.push("srun".to_owned());
            words.extend(self.version.dialect().whole_node_step(None, cpus_per_node(resources)));
            words.extend(container);
        }
        words.extend(request.command.iter().cloned());
        Ok(format!("\nexec {}\n", shell_words(&words)?))
    }
}

/// A path for the batch system, which takes `%` in it for a placeholder.
fn path(path: &Path) -> Result<String, Failure> {
    let text = path.to_str().ok_or_else(|| Failure::new(FailureKind::Recipe, "the path is not UTF-8").at(path.display()))?;
    if path.is_relative() {
        return Err(Failure::new(FailureKind::Recipe, "a job needs absolute paths").found(text));
    }
    let name_is_plain = !path.parent().unwrap_or(path).to_string_lossy().contains('%');
    if name_is_plain { Ok(text.to_owned()) } else { Err(Failure::new(FailureKind::Recipe, "a job's folder cannot hold `%`").found(text)) }
}

#[cfg(test)]
mod tests;
