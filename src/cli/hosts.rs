//! Hosts of a run that a remote shell reaches: which slots each has, what is started there, and where the controller listens for them.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _, UdpSocket};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use cloze_cluster::host::host_name;
use cloze_launcher::hosts::{HostSlots, HostsPlan, Preparation, RemoteHost, is_name_of};
use cloze_launcher::preflight::NodeOptions;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::Recipe;
use cloze_recipes::site::{Preflight, Site, SiteKind, SshSite};
use cloze_recipes::study::Resources;

use super::preflight::{MachineCheck, agent_words, measure, verdict};

/// Remote shell unless told otherwise. It must not ask: nobody answers.
const REMOTE_SHELL: &str = "ssh -o BatchMode=yes";
/// Longest wait of `cloze join` for the controller, in seconds; the controller listens before it starts the first one.
const JOIN_TIMEOUT_S: u32 = 60;
/// Any port does: nothing is sent.
const SOME_PORT: u16 = 9;

/// Other hosts of a run, shared by `train` and `resume`.
#[derive(Args, Clone, Debug, Default)]
pub struct HostsArguments {
    /// Hosts of the run, separated by commas; workers are started there through a remote shell. The run folder must be on a disk that all
    /// share. This machine may be among them, by its name or as localhost
    #[arg(long, value_name = "HOSTS", value_delimiter = ',', conflicts_with_all = ["workers", "local", "cluster"])]
    pub hosts: Vec<String>,
    /// Workers on each of the hosts
    #[arg(long, value_name = "N", default_value_t = 1, requires = "hosts", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub workers_per_host: u32,
    /// Remote shell and its options, after which come the host and one quoted command line
    #[arg(long, value_name = "WORDS", default_value = REMOTE_SHELL, requires = "hosts")]
    pub remote_shell: String,
    /// Cluster file: with `kind: ssh` the first of its hosts, as many as `resources.nodes` says; with `kind: local` this machine
    #[arg(long, value_name = "FILE", conflicts_with_all = ["workers", "local"])]
    pub cluster: Option<PathBuf>,
}

/// The hosts of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Hosts {
    /// Workers on this machine, from slot 0.
    pub local_workers: u32,
    /// Workers over all hosts.
    pub workers: u32,
    /// The other hosts, with the slots after those.
    others: Vec<HostSlots>,
    /// What the site does before anything is started there.
    preparation: Preparation,
    /// The site's folder for runs.
    pub folder: Option<PathBuf>,
    /// The check of the machines before step 0; `None` where no site asks for one.
    preflight: Option<Preflight>,
}

impl Hosts {
    /// The hosts that were named, here or in a cluster file, for the resources of a recipe; `None` where none was. One that is named twice
    /// is refused, and so is a site with a batch system.
    pub fn of(arguments: &HostsArguments, resources: impl FnOnce() -> Result<Resources>) -> Result<Option<Self>> {
        let Some(file) = &arguments.cluster else {
            let shell = arguments.remote_shell.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
            if arguments.hosts.is_empty() {
                return Ok(None);
            }
            return Ok(Some(Self::new(&arguments.hosts, arguments.workers_per_host, &shell, &host_name())?));
        };
        let site = cloze_recipes::load_site(file)?;
        match &site.kind {
            SiteKind::Local => {
                let resources = resources()?;
                let workers = resources.nodes.saturating_mul(resources.workers_per_node);
                let (others, preparation) = (Vec::new(), Preparation::default());
                Ok(Some(Self { local_workers: workers, workers, others, preparation, folder: site.folder, preflight: None }))
            }
            SiteKind::Slurm(_) => {
                let failure = Failure::new(FailureKind::Recipe, "this cluster's machines are given out by a batch system");
                Err(failure.at(file.display()).hint("use `cloze submit RECIPE --cluster FILE`").into())
            }
            SiteKind::Ssh(ssh) => {
                let resources = resources()?;
                Self::of_site(&site, ssh, &resources).map(Some).map_err(|failure| failure.at(file.display()).into())
            }
        }
    }

    /// The first hosts of a site, as many as the resources say.
    fn of_site(site: &Site, ssh: &SshSite, resources: &Resources) -> Result<Self, Failure> {
        let Some(names) = ssh.hosts.get(..resources.nodes as usize) else {
            let failure = Failure::new(FailureKind::Recipe, "the cluster file names too few hosts").found(ssh.hosts.len());
            return Err(failure.expected(format!("at least {} (`resources.nodes`)", resources.nodes)));
        };
        let mut hosts = Self::new(names, resources.workers_per_node, &ssh.command, &host_name())?;
        hosts.folder.clone_from(&site.folder);
        hosts.preflight = Some(site.preflight).filter(|preflight| preflight.enabled);
        hosts.preparation = Preparation::of(site, resources);
        Ok(hosts)
    }

    /// Deals the slots out: first this machine's, if it is among them, then those of the others in their order.
    pub fn new(names: &[String], workers_per_host: u32, shell: &[String], here: &str) -> Result<Self, Failure> {
        let wrong = |what: &str| Failure::new(FailureKind::Recipe, what.to_owned()).found(names.join(","));
        if names.iter().any(|name| name.is_empty() || name.starts_with('-') || name.contains(char::is_whitespace)) {
            return Err(wrong("a host has no usable name").expected("names or addresses, separated by commas"));
        }
        if shell.is_empty() {
            return Err(wrong("there is no remote shell to reach the hosts with"));
        }
        let is_here = |name: &str| is_name_of(name, here);
        if names.iter().enumerate().any(|(place, name)| names[..place].contains(name))
            || names.iter().filter(|name| is_here(name)).count() > 1
        {
            return Err(wrong("a host is named twice").hint("`--workers-per-host` gives a host more workers"));
        }
        let local_workers = if names.iter().any(|name| is_here(name)) { workers_per_host } else { 0 };
        let others = names.iter().filter(|name| !is_here(name)).enumerate().map(|(place, name)| HostSlots {
            host: RemoteHost::by_shell(name, shell),
            first_slot: local_workers + place as u32 * workers_per_host,
            num_slots: workers_per_host,
        });
        let others: Vec<HostSlots> = others.collect();
        let workers = local_workers + others.len() as u32 * workers_per_host;
        Ok(Self { local_workers, workers, others, preparation: Preparation::default(), folder: None, preflight: None })
    }

    /// Checks the machines, where the site asks for it; bad ones are named in the failure.
    pub fn check_machines(&self, recipe: &Recipe, run: &Path) -> Result<()> {
        let Some(limits) = self.preflight.filter(|_| !self.others.is_empty()) else { return Ok(()) };
        let here = (self.local_workers > 0).then(|| RemoteHost::here(&host_name()));
        let hosts = here.into_iter().chain(self.others.iter().map(|other| other.host.clone()));
        let nodes = hosts.map(|host| NodeOptions { host, address: None }).collect();
        let run = std::path::absolute(run).context("find the run folder")?;
        let place = recipe.checkpoint.url.clone().unwrap_or_else(|| run.display().to_string());
        let agent = [self.preparation.words(), agent_words()?].concat();
        let devices = self.others.first().map_or(1, |other| other.num_slots);
        let report = measure(MachineCheck { nodes, agent, recipe, place, devices, limits })?;
        verdict(&report)?;
        Ok(())
    }

    /// What is started on the others for a run.
    pub fn plan(&self, run: &Path) -> Result<HostsPlan> {
        let run = std::path::absolute(run).context("find the run folder")?;
        let mut words = self.preparation.words();
        let program = std::env::current_exe().context("find this program")?;
        words.extend([program.display().to_string(), "join".to_owned(), run.display().to_string()]);
        words.extend(["--join-timeout".to_owned(), JOIN_TIMEOUT_S.to_string()]);
        Ok(HostsPlan { hosts: self.others.clone(), join: words })
    }

    /// Address of this machine on the way to the others; fails where it cannot be found, since the workers must reach it.
    pub fn listen(&self) -> Result<Option<SocketAddr>, Failure> {
        let Some(first) = self.others.first() else { return Ok(None) };
        let name = first.host.name.rsplit('@').next().unwrap_or_default();
        match address_towards(name) {
            Ok(address) => Ok(Some(SocketAddr::new(address, 0))),
            Err(error) => Err(Failure::new(FailureKind::Environment, "this machine's address on the way to a host is not known")
                .at(name)
                .because(error)
                .hint("say where the coordinator listens: `--listen ADDRESS:0`, with an address that all hosts reach")),
        }
    }
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
    use super::*;

    fn names(text: &str) -> Vec<String> {
        text.split(',').map(str::to_owned).collect()
    }

    fn hosts(text: &str) -> Result<Hosts, Failure> {
        Hosts::new(&names(text), 2, &names("ssh"), "a.example.org")
    }

    #[test]
    fn this_machine_has_the_first_slots() {
        // (hosts, local workers, other hosts with their first slots)
        let cases: [(&str, u32, &[(&str, u32)]); 5] = [
            ("b,c", 0, &[("b", 0), ("c", 2)]),
            ("b,a,c", 2, &[("b", 2), ("c", 4)]),
            ("localhost,b", 2, &[("b", 2)]),
            ("a.example.org", 2, &[]),
            ("user@b", 0, &[("user@b", 0)]),
        ];
        for (text, local_workers, others) in cases {
            let found = hosts(text).unwrap();
            let shown: Vec<(&str, u32)> = found.others.iter().map(|other| (other.host.name.as_str(), other.first_slot)).collect();
            assert_eq!((found.local_workers, shown.as_slice()), (local_workers, others), "{text}");
            assert_eq!(found.workers as usize, 2 * text.split(',').count());
        }
    }

    #[test]
    fn wrong_lists_are_refused() {
        for text in ["b,b", "a,localhost", "a,b,", "-oProxyCommand=x", "b c"] {
            assert_eq!(hosts(text).unwrap_err().kind, FailureKind::Recipe, "{text}");
        }
    }

    #[test]
    fn the_way_to_loopback_leaves_from_loopback() {
        assert_eq!(address_towards("127.0.0.1").unwrap(), IpAddr::from([127, 0, 0, 1]));
        assert!(hosts("no-such-host.invalid").unwrap().listen().unwrap_err().hint.unwrap().contains("--listen"));
    }
}
