//! Hosts before and beside a sweep: whether a site has them, whether they can be used, and how their batches are for whoever only looks.

use std::collections::{BTreeMap, BTreeSet};
use std::thread;

use cloze_cluster::host::host_name;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::site::{Site, SshSite};
use cloze_recipes::study::Resources;

use super::super::visit::{Orders, Word};
use super::HostsOptions;
use super::call::Visitor;
use crate::hosts::{Preparation, RemoteHost};

/// What a site says of its hosts. Fails with kind `Recipe` where it has none, and where trials are to have several of them.
pub fn site_of_hosts<'a>(resources: &Resources, site: &'a Site) -> Result<&'a SshSite, Failure> {
    let ssh = super::super::folder::hosts(Some(site)).ok_or_else(|| {
        Failure::new(FailureKind::Recipe, "the site has no list of hosts").at(&site.name).expected("`kind: ssh` in the cluster file")
    })?;
    if resources.nodes <= 1 {
        return Ok(ssh);
    }
    Err(Failure::new(FailureKind::Recipe, "a trial on hosts that a remote shell reaches has one of them")
        .at("resources.nodes")
        .expected(format!("1, at the site `{}`", site.name))
        .found(resources.nodes)
        .hint("`--set resources.nodes=1` gives each trial one host; trials of several nodes need `kind: slurm`"))
}

/// Asks a host how these batches are, which it has claimed; nothing is changed there.
pub(in super::super) fn look_at(options: HostsOptions, site: &Site, host: &str, looks: Vec<u32>) -> Result<BTreeMap<u32, Word>, Failure> {
    let ssh = site_of_hosts(&options.resources, site)?;
    let preparation = Preparation::of(site, &options.resources).words();
    let visitor = Visitor { preparation, program: options.program, folder: options.folder };
    let orders = Orders { host: host.to_owned(), looks, ..Orders::default() };
    Ok(visitor.visit(&RemoteHost::of(host, &ssh.command, &host_name()), &orders)?.batches)
}

/// Visits each host of a site, all at the same time, to find out whether it can be reached and has the program. Fails with kind
/// `Environment` where none can be used, and with `Recipe` where the list names one machine twice.
pub fn greet_hosts(options: &HostsOptions, site: &Site) -> anyhow::Result<()> {
    let ssh = site_of_hosts(&options.resources, site)?;
    let preparation = Preparation::of(site, &options.resources).words();
    let visitor = Visitor { preparation, program: options.program.clone(), folder: options.folder.clone() };
    let here = host_name();
    let hosts: Vec<RemoteHost> = ssh.hosts.iter().map(|name| RemoteHost::of(name, &ssh.command, &here)).collect();
    check_names(&hosts)?;
    let answers: Vec<(&RemoteHost, Result<(), Failure>)> = thread::scope(|scope| {
        let greetings: Vec<_> = hosts.iter().map(|host| (host, scope.spawn(|| visitor.greet(host)))).collect();
        let lost = || Err(Failure::new(FailureKind::Environment, "a thread panicked"));
        greetings.into_iter().map(|(host, greeting)| (host, greeting.join().unwrap_or_else(|_| lost()))).collect()
    });
    if answers.iter().any(|(_, answer)| answer.is_ok()) {
        return Ok(());
    }
    let bad: Vec<(&RemoteHost, Failure)> = answers.into_iter().filter_map(|(host, answer)| Some((host, answer.err()?))).collect();
    let lines: Vec<String> = bad.iter().map(|(host, failure)| format!("{}: {}", host.name, brief(failure))).collect();
    let failure = Failure::new(FailureKind::Environment, "no host of the site can be used").at(&site.name).because(lines.join("\n    "));
    let hint = bad.into_iter().find_map(|(_, failure)| failure.hint);
    Err(hint.map_or(failure.clone(), |hint| failure.hint(hint)).into())
}

/// A failure in one line, behind the name of a host.
pub(super) fn brief(failure: &Failure) -> String {
    let cause = failure.cause.as_ref().map_or_else(String::new, |cause| format!(": {cause}"));
    let found = failure.found.as_ref().map_or_else(String::new, |found| format!(" ({found})"));
    format!("{}{found}{cause}", failure.what)
}

/// Refuses a list that names one machine twice.
pub(super) fn check_names(hosts: &[RemoteHost]) -> Result<(), Failure> {
    let mut seen = BTreeSet::new();
    match hosts.iter().find(|host| !seen.insert(host.name.as_str())) {
        None => Ok(()),
        Some(host) => Err(Failure::new(FailureKind::Recipe, "a host is named twice").at("ssh.hosts").found(&host.name)),
    }
}
