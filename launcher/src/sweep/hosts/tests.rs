//! Hosts by a remote shell that answers from files.

use std::path::Path;

use super::super::claim::Worker;
use super::super::fixtures;
use super::super::record::Place;
use super::super::share::Part;
use super::greet::check_names;
use super::*;
use crate::sample::resources;

/// Longest wait for something that takes milliseconds on a free machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// A remote shell: a host that is `down-HOST` is not reached, and all others say what is in `report`, as the program there would.
const SHELL: &str = r#"cd "$ROOT"; echo "$1 $2" >> asked; test ! -e "down-$1" || exit 255; cat report"#;

/// Hosts `n1` and `n2` of a study in this folder, at most three trials at a time.
fn hosts(root: &Path) -> Hosts {
    let folder = StudyFolder::new(root.join("study"));
    fs::create_dir_all(folder.root()).unwrap();
    folder.make().unwrap();
    fs::write(folder.lock_path(), "7 login\n").unwrap();
    say(root, "");
    let shell = SHELL.replace("$ROOT", &root.display().to_string());
    let command = serde_json::json!(["sh", "-c", shell, "ssh"]);
    let site = fixtures::site("lab", &format!("kind: ssh\nssh: {{hosts: [n1, n2], command: {command}, lost_after_s: 15}}"));
    let options = HostsOptions { folder, program: PathBuf::from("/bin/cloze"), resources: resources(), concurrency: 3 };
    Hosts::new(options, &site).unwrap()
}

/// Lets the hosts that are there say this of batches.
fn say(root: &Path, batches: &str) {
    let partial = root.join("partial");
    fs::write(&partial, format!("{{\"visit\":1,\"batches\":{{{batches}}}}}\n")).unwrap();
    fs::rename(&partial, root.join("report")).unwrap();
}

fn batch(number: u32) -> Batch {
    Batch { number, elements: Vec::new() }
}

fn out(number: u32) -> Out<'static> {
    Out { trial: number as usize, hash: "h", place: Place { batch: number, element: 0 } }
}

/// Looks after the hosts until this is so.
#[track_caller]
fn tend_until(hosts: &mut Hosts, what: &str, mut done: impl FnMut(&mut Hosts) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        hosts.tend().unwrap();
        if done(hosts) {
            return;
        }
        assert!(Instant::now() < deadline, "{what}");
        sleep(Duration::from_millis(10));
    }
}

fn asked(root: &Path) -> String {
    fs::read_to_string(root.join("asked")).unwrap_or_default()
}

#[test]
fn batches_are_spread_and_one_that_is_gone_is_told() {
    let root = tempfile::tempdir().unwrap();
    let mut hosts = hosts(root.path());
    assert_eq!(hosts.room(), 0, "no host has answered yet");
    tend_until(&mut hosts, "both hosts answer", |hosts| hosts.room() == 3);
    for number in 1..=3 {
        hosts.submit(&batch(number)).unwrap();
    }
    assert_eq!(hosts.room(), 0);
    let outs = [out(1), out(2), out(3)];
    say(root.path(), r#""1":"lives","2":"lives","3":"lives""#);
    tend_until(&mut hosts, "the hosts have begun", |hosts| hosts.batches.values().all(|given| given.word.is_some()));
    let words = asked(root.path());
    for told in ["n1 /bin/cloze sweep visit ", "--start=1:0:2", "--start=2:0:2", "--start=3:1:2", "--controller=7 login"] {
        assert!(words.contains(told), "{told} in {words}");
    }
    assert_eq!(hosts.gone(&outs).unwrap(), Vec::new());
    say(root.path(), r#""1":"lives","2":{"gone":"process 9 has ended"},"3":"ended""#);
    hosts.states.iter_mut().for_each(|host| host.next_visit = Instant::now());
    let mut gone = Vec::new();
    tend_until(&mut hosts, "one is gone", |hosts| {
        gone.extend(hosts.gone(&outs).unwrap());
        !gone.is_empty()
    });
    assert_eq!(gone, [Gone::ended(2, "n2: process 9 has ended".to_owned())]);
    // The other ones are waited for; one has its outcome, and its place is free.
    hosts.forget(3, true);
    assert_eq!((hosts.room(), hosts.states[0].check, hosts.states[1].check), (2, Check::Passed, Check::Open));
    hosts.stop(&[out(1)]);
    tend_until(&mut hosts, "the host is told", |hosts| hosts.batches[&1].stop == Stop::Told);
    assert!(asked(root.path()).contains("--stop=1") && hosts.visitor.folder.leave_path(1).exists());
    assert!(hosts.left_behind()[0].contains("batch 1 may still run on n1"));
}

#[test]
fn what_a_host_has_not_begun_when_it_goes_is_taken_back() {
    let root = tempfile::tempdir().unwrap();
    let mut hosts = hosts(root.path());
    tend_until(&mut hosts, "both hosts answer", |hosts| hosts.room() == 3);
    fs::write(root.path().join("down-n1"), "").unwrap();
    hosts.submit(&batch(1)).unwrap();
    let mut gone = Vec::new();
    tend_until(&mut hosts, "the batch is taken back", |hosts| {
        gone.extend(hosts.gone(&[out(1)]).unwrap());
        !gone.is_empty()
    });
    assert_eq!((gone, hosts.room()), (vec![Gone::not_begun(1)], 2));
    assert_eq!(Claim::read(&hosts.visitor.folder, 1).unwrap(), Some(Claim::Withdrawn));
    let news = hosts.news();
    assert_eq!(news.len(), 1, "{news:?}");
    assert!(news[0].starts_with("warning: host n1 is left out until it answers: it cannot be reached (exit code 255)"), "{news:?}");
    fs::remove_file(root.path().join("down-n1")).unwrap();
    tend_until(&mut hosts, "it is tried again", |hosts| hosts.room() == 3);
    assert_eq!(hosts.news(), ["host n1 answers again"]);
}

#[test]
fn what_a_host_has_begun_stays_with_it_until_its_sign_of_life_fails() {
    let root = tempfile::tempdir().unwrap();
    let mut hosts = hosts(root.path());
    let folder = hosts.visitor.folder.clone();
    let worker = Worker { host: "n2".to_owned(), process_id: 1, start_ticks: 1, boot: "b".to_owned(), machine: "m".to_owned(), part: None };
    Claim::Taken(worker).make(&folder, 5).unwrap();
    fs::write(root.path().join("down-n2"), "").unwrap();
    // An earlier controller has given out both; nobody had begun with the other one.
    let outs = [out(5), out(6)];
    assert_eq!(hosts.gone(&outs).unwrap(), [Gone::not_begun(6)]);
    tend_until(&mut hosts, "the host is not reached", |hosts| hosts.states[1].failures > 0);
    assert_eq!(hosts.gone(&outs[..1]).unwrap(), Vec::new());
    let ago = |seconds| Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
    // The sign has changed since.
    hosts.began = ago(16);
    fs::write(folder.beat_path(5), "2").unwrap();
    assert_eq!(hosts.gone(&outs[..1]).unwrap(), Vec::new());
    hosts.began = ago(33);
    let gone = hosts.gone(&outs[..1]).unwrap();
    assert!(gone[0].is_begun && gone[0].how.contains("gives no sign of life for 1"), "{gone:?}");
    assert!(folder.given_up_path(5).exists(), "what works there cannot know");
    assert!(hosts.news().iter().any(|line| line.contains("its trial is given to another host")));
    // When the host is there again nothing of it may be left.
    fs::remove_file(root.path().join("down-n2")).unwrap();
    tend_until(&mut hosts, "the host answers again", |hosts| hosts.states[1].failures == 0 && hosts.states[1].ends.is_empty());
    assert!(asked(root.path()).contains("--end=5"));
}

#[test]
fn a_trial_of_an_earlier_controller_keeps_its_place() {
    let root = tempfile::tempdir().unwrap();
    let mut hosts = hosts(root.path());
    let part = Some(Part { place: 1, of: 2 });
    let worker = Worker { host: "n1".to_owned(), process_id: 1, start_ticks: 1, boot: "b".to_owned(), machine: "m".to_owned(), part };
    Claim::Taken(worker).make(&hosts.visitor.folder.clone(), 5).unwrap();
    assert_eq!(hosts.gone(&[out(5)]).unwrap(), Vec::new());
    tend_until(&mut hosts, "both hosts answer", |hosts| hosts.room() == 2);
    for number in 6..=7 {
        hosts.submit(&batch(number)).unwrap();
    }
    let given: Vec<(usize, u32)> = hosts.batches.values().map(|given| (given.host, given.place)).collect();
    assert_eq!(given, [(0, 1), (1, 0), (0, 0)], "the last one shares a host with the first, and no place");
}

#[test]
fn a_bad_host_is_left_out_while_another_one_is_left() {
    let root = tempfile::tempdir().unwrap();
    let mut hosts = hosts(root.path());
    tend_until(&mut hosts, "both hosts answer", |hosts| hosts.room() == 3);
    for number in 1..=2 {
        hosts.submit(&batch(number)).unwrap();
    }
    let of = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
    assert_eq!(hosts.avoid(2), Avoided { news: of(&["n2"]), ..Avoided::default() });
    assert_eq!(hosts.avoid(2), Avoided::default(), "it is told once");
    assert_eq!(hosts.room(), 1);
    assert_eq!(hosts.avoid(1), Avoided { spared: of(&["n1"]), ..Avoided::default() });
    assert_eq!((hosts.avoid(1), hosts.avoid(9)), (Avoided::default(), Avoided::default()));
}

#[test]
fn hosts_that_answer_nothing_end_the_controller_in_the_end() {
    let root = tempfile::tempdir().unwrap();
    let mut hosts = hosts(root.path());
    for name in ["n1", "n2"] {
        fs::write(root.path().join(format!("down-{name}")), "").unwrap();
    }
    tend_until(&mut hosts, "both are left out", |hosts| hosts.states.iter().all(|host| host.failures > 0));
    hosts.last_answer = Instant::now().checked_sub(Duration::from_secs(SILENCE_MAX_S)).unwrap();
    let failure: Failure = hosts.tend().unwrap_err().downcast().unwrap();
    assert_eq!((failure.kind, failure.place.as_deref()), (FailureKind::Environment, Some("n1, n2")));
}

#[test]
fn a_list_of_hosts_has_no_trials_of_several_nodes() {
    let site = |kind| fixtures::site("lab", kind);
    let on_hosts = site("kind: ssh\nssh: {hosts: [n1]}");
    assert!(site_of_hosts(&resources(), &on_hosts).is_ok());
    assert_eq!(site_of_hosts(&resources(), &site("kind: slurm")).unwrap_err().kind, FailureKind::Recipe);
    let wide = Resources { nodes: 2, ..resources() };
    let failure = site_of_hosts(&wide, &on_hosts).unwrap_err();
    assert_eq!((failure.kind, failure.place.as_deref(), failure.hint.is_some()), (FailureKind::Recipe, Some("resources.nodes"), true));
    let of = |names: &[&str]| names.iter().map(|name| RemoteHost::here(name)).collect::<Vec<_>>();
    assert!(check_names(&of(&["a", "b"])).is_ok());
    assert_eq!(check_names(&of(&["a", "b", "a"])).unwrap_err().found.as_deref(), Some("a"));
}

#[test]
fn a_sweep_begins_where_one_host_can_be_used() {
    let root = tempfile::tempdir().unwrap();
    let hosts = hosts(root.path());
    let options =
        HostsOptions { folder: hosts.visitor.folder.clone(), program: PathBuf::from("/bin/cloze"), resources: resources(), concurrency: 1 };
    let command = serde_json::to_string(&hosts.site.command).unwrap();
    let site = fixtures::site("lab", &format!("kind: ssh\nssh: {{hosts: [n1, n2], command: {command}}}"));
    fs::write(root.path().join("down-n1"), "").unwrap();
    greet_hosts(&options, &site).unwrap();
    fs::write(root.path().join("down-n2"), "").unwrap();
    let failure: Failure = greet_hosts(&options, &site).unwrap_err().downcast().unwrap();
    assert_eq!((failure.kind, failure.what.as_str()), (FailureKind::Environment, "no host of the site can be used"));
    let cause = "n1: it cannot be reached (exit code 255)\n    n2: it cannot be reached (exit code 255)";
    assert_eq!((failure.cause.as_deref(), failure.hint.is_some()), (Some(cause), true));
}
