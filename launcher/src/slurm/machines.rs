//! The machines of the job around this process, and how something is started on one of them.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _, UdpSocket};
use std::path::Path;

use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::site::{Site, SiteKind};
use cloze_recipes::study::Resources;

use super::client::Slurm;
use super::job::JobId;
use super::script::{container_options, cpus_per_node};
use super::submission::Submission;
use crate::hosts::{CommandForm, HostSlots, HostsPlan, RemoteHost};
use crate::run_folder::RunPaths;

/// Any port does: nothing is sent.
const SOME_PORT: u16 = 9;

/// Longest wait of the other nodes for the controller, in seconds; it listens before it starts the first of them.
const JOIN_TIMEOUT_S: u32 = 120;

/// Environment variable with the name of this process's node.
pub(super) const NODE_VARIABLE: &str = "SLURMD_NODENAME";

/// The job around this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machines {
    /// The job.
    pub job: JobId,
    /// Its name.
    pub name: String,
    /// How often it was put back before.
    pub requeues: u32,
    /// Its nodes; this process runs on the first of them.
    pub nodes: Vec<String>,
}

impl Machines {
    /// Reads the variables that the batch system sets. Fails with kind `Recipe` outside of a job.
    pub fn of_this_job(slurm: &Slurm) -> Result<Self, Failure> {
        let get = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let (Some(job), Some(list)) = (get("SLURM_JOB_ID"), get("SLURM_JOB_NODELIST")) else {
            return Err(Failure::new(FailureKind::Recipe, "this is no job of SLURM")
                .expected("SLURM_JOB_ID and SLURM_JOB_NODELIST in the environment")
                .hint("`cloze submit` submits a run; its job starts this command"));
        };
        let job = job.parse().map_err(|error| Failure::new(FailureKind::Environment, "SLURM_JOB_ID names no job").because(error))?;
        let mut nodes = slurm.host_names(&list)?;
        // The batch script runs on the first node of the list; where the site sorts otherwise, this one is put first.
        if let Some(here) = get(NODE_VARIABLE)
            && let Some(place) = nodes.iter().position(|node| *node == here)
        {
            let here = nodes.remove(place);
            nodes.insert(0, here);
        }
        if nodes.is_empty() {
            return Err(Failure::new(FailureKind::Environment, "the job has no nodes").found(list));
        }
        let requeues = get("SLURM_RESTART_COUNT").and_then(|count| count.parse().ok()).unwrap_or(0);
        Ok(Self { job, name: get("SLURM_JOB_NAME").unwrap_or_default(), requeues, nodes })
    }

    /// Where the coordinator listens: at this node's address on the way to the others; `None`, which is loopback, for a single node.
    pub fn listen(&self) -> Result<Option<SocketAddr>, Failure> {
        let Some(other) = self.nodes.get(1) else { return Ok(None) };
        address_towards(other).map(|address| Some(SocketAddr::new(address, 0))).map_err(|error| {
            Failure::new(FailureKind::Environment, "this node's address on the way to another node of the job is not known")
                .at(other)
                .because(error)
                .hint("the names of the nodes must have addresses (`getent hosts NODE`)")
        })
    }

    /// Workers that are started by this process itself, on the first node.
    pub fn local_workers(submission: &Submission) -> u32 {
        if has_container(&submission.resources, &submission.site) { 0 } else { submission.resources.workers_per_node }
    }

    /// What is started on the other nodes, and in the container of the first one: `cloze join` for the slots of each.
    pub fn hosts(&self, slurm: &Slurm, submission: &Submission, run: &RunPaths) -> HostsPlan {
        let per_node = submission.resources.workers_per_node;
        let first = usize::from(!has_container(&submission.resources, &submission.site));
        let hosts = self.nodes.iter().enumerate().skip(first).map(|(place, node)| HostSlots {
            host: RemoteHost { name: node.clone(), prefix: step(slurm, submission, run.root(), Some(node)), form: CommandForm::Words },
            first_slot: place as u32 * per_node,
            num_slots: per_node,
        });
        let program = submission.programs.cloze.display().to_string();
        let run = run.root().display().to_string();
        let join = [program, "join".to_owned(), run, "--join-timeout".to_owned(), JOIN_TIMEOUT_S.to_string()].to_vec();
        HostsPlan { hosts: hosts.collect(), join }
    }

    /// The words of `cloze preflight` for the nodes of this job.
    pub fn preflight(&self, slurm: &Slurm, submission: &Submission, run: &RunPaths) -> Vec<String> {
        let preflight = &submission.site.preflight;
        // `{node}` is what the command puts a node's name in for.
        let launch = step(slurm, submission, run.root(), Some("{node}")).join(" ");
        let devices = submission.resources.gpus_per_node.max(1);
        let mut words = vec![submission.programs.cloze.display().to_string(), "preflight".to_owned(), run.root().display().to_string()];
        words.push(format!("--nodes={}", self.nodes.join(",")));
        words.push(format!("--launch={launch}"));
        words.push(format!("--devices={devices}"));
        words.push(format!("--min-bandwidth-share={}", preflight.min_bandwidth_share));
        words.push(format!("--max-slowdown={}", preflight.max_slowdown));
        words.push(format!("--timeout={}", preflight.timeout_s));
        words
    }
}

/// The words before a command that is to run on a node of this job, with all that the job has there, beside what runs there already.
pub fn step(slurm: &Slurm, submission: &Submission, run: &Path, node: Option<&str>) -> Vec<String> {
    step_in(slurm, (&submission.site, &submission.resources), run, node)
}

/// The same for the node of this process, where no run was submitted: for the other programs of a trial of several nodes. Fails with kind
/// `Environment` where there is no batch system.
pub fn step_on_this_node(site: &Site, resources: &Resources, folder: &Path) -> Result<Vec<String>, Failure> {
    let SiteKind::Slurm(slurm_site) = &site.kind else {
        return Err(Failure::new(FailureKind::Recipe, "the site has no batch system").at(&site.name));
    };
    let here = std::env::var(NODE_VARIABLE).ok().filter(|value| !value.is_empty());
    Ok(step_in(&Slurm::find(slurm_site)?, (site, resources), folder, here.as_deref()))
}

fn step_in(slurm: &Slurm, (site, resources): (&Site, &Resources), folder: &Path, node: Option<&str>) -> Vec<String> {
    let mut words = vec![slurm.program("srun").display().to_string()];
    words.extend(slurm.dialect().whole_node_step(node, cpus_per_node(resources)));
    words.extend(container_options(resources, site, &[folder]));
    words
}

/// Whether what works on a run does so in a container.
pub fn has_container(resources: &Resources, site: &Site) -> bool {
    resources.container.is_some() || site.container.is_some()
}

/// The address that packets to a host leave from. Nothing is sent.
fn address_towards(name: &str) -> std::io::Result<IpAddr> {
    let target = (name, SOME_PORT).to_socket_addrs()?.next().ok_or_else(|| std::io::Error::other("the name has no address"))?;
    let any: IpAddr = if target.is_ipv4() { [0, 0, 0, 0].into() } else { [0_u16; 8].into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(target)?;
    Ok(socket.local_addr()?.ip())
}

#[cfg(test)]
mod tests {
    use cloze_recipes::study::Container;

    use super::super::client::fixtures::{cluster, resources, whole_site};
    use super::*;

    #[test]
    fn a_program_of_a_trial_enters_the_container_of_its_node() {
        let (_programs, slurm) = cluster(&[]);
        let (site, mut machines) = (whole_site(), resources(2));
        assert!(!has_container(&machines, &site));
        machines.container = Some(Container { image: "cloze.sqsh".to_owned(), mounts: vec!["/data:/data".to_owned()] });
        assert!(has_container(&machines, &site));
        let words = step_in(&slurm, (&site, &machines), Path::new("/shared/glue"), Some("n2"));
        assert!(words[0].ends_with("/srun"), "{}", words[0]);
        let options = "--nodes=1 --ntasks=1 --overlap --mem=0 --cpu-bind=none --export=ALL --nodelist=n2 --cpus-per-task=32 \
                       --container-image=cloze.sqsh --container-mounts=/data:/data,/shared/glue:/shared/glue";
        assert_eq!(words[1..].join(" "), options);
    }
}
