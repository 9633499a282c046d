//! Cluster files: what comes out of right ones, and what is wrong with the others.

use std::path::PathBuf;

use super::*;
use crate::failure::{Failure, FailureKind};
use crate::site::{Preflight, SlurmSite, SshSite};

/// Reads a file with this text; the folder's path is replaced in errors.
fn loaded(text: &str) -> Result<(Site, PathBuf), String> {
    let folder = tempfile::tempdir().unwrap();
    let folder_path = folder.path().canonicalize().unwrap();
    let path = folder_path.join("c.yaml");
    std::fs::write(&path, text).unwrap();
    load_site(&path).map(|site| (site, folder_path.clone())).map_err(|error| {
        assert_eq!(error.downcast_ref::<Failure>().unwrap().kind, FailureKind::Recipe);
        error.to_string().replace(&format!("{}/", folder_path.display()), "")
    })
}

const PREFLIGHT: Preflight = Preflight { enabled: true, min_bandwidth_share: 0.3, max_slowdown: 3.0, timeout_s: 300 };

#[test]
fn a_short_file_is_filled_with_the_defaults() {
    let (site, _) = loaded("version: 1\nname: here\nkind: local\n").unwrap();
    assert_eq!(site, Site { name: "here".to_owned(), ..Site::local() });
    assert_eq!(site.preflight, PREFLIGHT);

    let (site, _) = loaded("version: 1\nname: c\nkind: slurm\n").unwrap();
    let expected = SlurmSite {
        partition: None,
        account: None,
        qos: None,
        constraint: None,
        exclude: Vec::new(),
        gpu_type: None,
        options: Vec::new(),
        time_limit_minutes: None,
        warning_s: 120,
        max_jobs: 20,
        poll_s: 2,
    };
    assert_eq!(site.kind, SiteKind::Slurm(expected));

    let (site, _) = loaded("version: 1\nname: c\nkind: ssh\nssh: {hosts: [a, root@b]}\n").unwrap();
    let command = ["ssh", "-o", "BatchMode=yes"].map(str::to_owned).to_vec();
    assert_eq!(site.kind, SiteKind::Ssh(SshSite { hosts: vec!["a".to_owned(), "root@b".to_owned()], command, lost_after_s: 300 }));
}

#[test]
fn everything_that_is_stated_is_read() {
    let text = "version: 1
name: mine
kind: slurm
folder: shared
slurm: {partition: main, account: a, qos: q, constraint: \"a100&ib\", exclude: [n3], gpu_type: h100, options: [\"--reservation=x y\"],
  time_limit_minutes: 720, warning_s: 60, max_jobs: 5, poll_s: 1}
container: {image: img, mounts: [\"/a:/b\"]}
modules: [cuda/13]
environment: {NAME: value}
setup: [ulimit -n 65536]
preflight: {enabled: false, min_bandwidth_share: 0.5, max_slowdown: 2, timeout_s: 10}
gpu_memory_mib: 81559
tokens_per_second: 30000
";
    let (site, folder) = loaded(text).unwrap();
    assert_eq!(site.folder, Some(folder.join("shared")), "a relative folder starts at the file");
    let SiteKind::Slurm(slurm) = &site.kind else { panic!("{site:?}") };
    assert_eq!((slurm.constraint.as_deref(), slurm.gpu_type.as_deref()), (Some("a100&ib"), Some("h100")));
    assert_eq!((slurm.options.join("|"), slurm.warning_s, slurm.max_jobs, slurm.poll_s), ("--reservation=x y".to_owned(), 60, 5, 1));
    assert_eq!(site.container.as_ref().unwrap().mounts, ["/a:/b"]);
    assert_eq!(
        (site.modules[0].as_str(), site.environment["NAME"].as_str(), site.setup[0].as_str()),
        ("cuda/13", "value", "ulimit -n 65536")
    );
    assert_eq!(site.preflight, Preflight { enabled: false, min_bandwidth_share: 0.5, max_slowdown: 2.0, timeout_s: 10 });
    assert_eq!((site.gpu_memory_mib, site.tokens_per_second), (Some(81_559), Some(30_000.0)));
}

#[test]
fn all_problems_are_told_at_once_with_their_places() {
    let text = "version: 2\nnam: c\nkind: slrm\nslurm: {partitions: x, warning_s: 0}\n";
    let expected = "5 problems in c.yaml
c.yaml:1:10: version: found 2, expected 1
c.yaml:2:1: nam: unknown key; did you mean `name`?
c.yaml:3:7: kind: found `slrm`, expected `local`, `ssh` or `slurm`
c.yaml:4:9: slurm.partitions: unknown key; did you mean `partition`?
c.yaml:4:35: slurm.warning_s: found 0, expected an integer from 1 to 65535";
    assert_eq!(loaded(text).unwrap_err(), expected);

    let text = "version: 1\nname: a b\nkind: local\nslurm: {}\nenvironment: {API_KEY: x}\n";
    let found = loaded(text).unwrap_err();
    for line in [
        "3 problems in c.yaml\n",
        "c.yaml:2:7: name: found `a b`, expected",
        "c.yaml:4:1: slurm: found this section with another kind, expected `kind: slurm`",
        "c.yaml:5:24: environment.API_KEY: a secret does not belong into this file",
    ] {
        assert!(found.contains(line), "{line}\nin\n{found}");
    }
}

#[test]
fn each_contradiction_has_its_words() {
    let table = [
        ("kind: ssh", "c.yaml:3:7: kind: found `ssh` without hosts, expected them in `ssh.hosts`"),
        (
            "kind: ssh\nssh: {hosts: [-oProxyCommand=x]}",
            "c.yaml:4:15: ssh.hosts.0: found `-oProxyCommand=x`, expected the name or address of a host",
        ),
        ("kind: ssh\nssh: {hosts: [a, a]}", "c.yaml:4:18: ssh.hosts.1: found `a` a second time, expected hosts that differ"),
        ("kind: ssh\nssh: {hosts: []}", "c.yaml:4:14: ssh.hosts: found a list of 0, expected a list of at least 1"),
        (
            "kind: slurm\nslurm: {options: [-x]}",
            "c.yaml:4:19: slurm.options.0: found `-x`, expected an option of `sbatch` in its long form, such as `--reservation=NAME`",
        ),
        (
            "kind: slurm\nslurm: {options: [\"--a\\n#SBATCH -x\"]}",
            "c.yaml:4:19: slurm.options.0: found `--a\\n#SBATCH -x`, expected one line without control characters",
        ),
        ("kind: slurm\nslurm: {options: [--qos=x]}", "c.yaml:4:19: slurm.options.0: found `--qos=x`, expected this in slurm.qos"),
        (
            "kind: slurm\nslurm: {options: [--signal=USR1@60]}",
            "c.yaml:4:19: slurm.options.0: found `--signal=USR1@60`, expected an option other than those by which runs are watched",
        ),
        (
            "kind: slurm\nslurm: {partition: \"a b\"}",
            "c.yaml:4:20: slurm.partition: found `a b`, expected one word without blanks, quotes, `$`, `;` and control characters, the first character not `-`",
        ),
        (
            "kind: slurm\nslurm: {time_limit_minutes: 2}",
            "c.yaml:4:29: slurm.time_limit_minutes: found 2, expected at least 3: slurm.warning_s is 120 s, and a job starts in 15 s or more",
        ),
        ("kind: local\nfolder: s3://b/x", "c.yaml:4:9: folder: found `s3://b/x`, expected a path on this machine, without a scheme"),
        ("kind: local\nsetup: [\"a\\tb\"]", "c.yaml:4:9: setup.0: found `a b`, expected one line without control characters"),
    ];
    for (lines, expected) in table {
        let found = loaded(&format!("version: 1\nname: c\n{lines}\n")).unwrap_err();
        assert_eq!(found, format!("1 problem in c.yaml\n{expected}"), "{lines}");
    }
}

#[test]
fn files_that_cannot_be_read_are_failures_with_a_place() {
    assert!(
        load_site(Path::new("/nowhere/c.yaml")).unwrap_err().to_string().starts_with("cannot read the cluster file\n  where: /nowhere")
    );
    let table = [
        ("- 1\n", "a cluster file is a map of keys\n"),
        ("a: [\n", "cannot read the cluster file as YAML\n"),
        (&"x".repeat((1 << 20) + 1), "the cluster file is too large\n"),
    ];
    for (text, expected) in table {
        assert!(loaded(text).unwrap_err().starts_with(expected), "{expected}");
    }
    assert!(loaded("version: 1\nname: c\nkind: local\nextends: x\n").unwrap_err().contains("extends: unknown key"));
}
