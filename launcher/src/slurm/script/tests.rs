//! Golden scripts: what a site's administrator would be shown.

use super::*;
use crate::sample::resources;

fn version() -> Version {
    Version { year: 22, month: 5 }
}

fn request() -> JobRequest {
    JobRequest {
        name: "cloze-first-1".to_owned(),
        command: ["/shared/runs/first/bin/1f/cloze", "allocation", "/shared/runs/first"].map(str::to_owned).to_vec(),
        folder: PathBuf::from("/shared/runs/first"),
        logs: PathBuf::from("/shared/runs/first/logs"),
        array: None,
        dependency: None,
        exclude: Vec::new(),
        survives_node_loss: false,
        in_container: false,
    }
}

fn slurm() -> SlurmSite {
    SlurmSite {
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
    }
}

fn site(slurm: SlurmSite) -> Site {
    Site {
        name: "mine".to_owned(),
        kind: SiteKind::Slurm(slurm),
        folder: None,
        container: None,
        modules: Vec::new(),
        environment: BTreeMap::new(),
        setup: Vec::new(),
        preflight: cloze_recipes::site::Preflight { enabled: true, min_bandwidth_share: 0.3, max_slowdown: 3.0, timeout_s: 300 },
        gpu_memory_mib: None,
        tokens_per_second: None,
    }
}

fn check(request: &JobRequest, resources: &Resources, site: &Site, expected: &str) {
    let script = render(request, resources, site, version()).unwrap();
    assert_eq!(script, expected, "\n{script}");
}

#[test]
fn the_smallest_job() {
    check(
        &request(),
        &resources(),
        &site(slurm()),
        "\
#!/bin/bash
#SBATCH --job-name=cloze-first-1
#SBATCH --chdir=/shared/runs/first
#SBATCH --output=/shared/runs/first/logs/job-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR2@120
#SBATCH --requeue

exec /shared/runs/first/bin/1f/cloze allocation /shared/runs/first
",
    );
}

const SEVERAL_NODES: &str = "\
#!/bin/bash
#SBATCH --job-name=cloze-first-1
#SBATCH --chdir=/shared/runs/first
#SBATCH --output=/shared/runs/first/logs/job-%j.log
#SBATCH --open-mode=append
#SBATCH --partition=main,big
#SBATCH --account=lab
#SBATCH --qos=high
#SBATCH --constraint=ib&nvme
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --mem=500000M
#SBATCH --gres=gpu:h100:8
#SBATCH --time=720
#SBATCH --signal=B:USR2@300
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --exclude=n3,n7
#SBATCH --dependency=afternotok:41
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --reservation=x
#SBATCH \"--comment=a b\"

fail() { echo \"error: the setup of the job failed: $1\" >&2; exit 5; }
module load cuda/13 || fail 'module load cuda/13'
module load nccl/2.28 || fail 'module load nccl/2.28'

export NOTE='it'\\''s $mine'
export OMP_NUM_THREADS=12
{ source /etc/site.sh
} || fail 'source /etc/site.sh'
{ ulimit -n 65536 # many files
} || fail 'ulimit -n 65536 # many files'

exec /shared/runs/first/bin/1f/cloze allocation /shared/runs/first
";

#[test]
fn several_nodes_with_gpus_and_everything_a_site_can_say() {
    let resources = Resources {
        nodes: 2,
        workers_per_node: 8,
        gpus_per_node: 8,
        cpus_per_worker: Some(12),
        memory_per_node_mib: Some(500_000),
        time_limit_minutes: Some(720),
        modules: vec!["nccl/2.28".to_owned()],
        environment: BTreeMap::from([("NOTE".to_owned(), "it's $mine".to_owned()), ("OMP_NUM_THREADS".to_owned(), "12".to_owned())]),
        setup: vec!["ulimit -n 65536 # many files".to_owned()],
        ..resources()
    };
    let slurm = SlurmSite {
        partition: Some("main,big".to_owned()),
        account: Some("lab".to_owned()),
        qos: Some("high".to_owned()),
        constraint: Some("ib&nvme".to_owned()),
        exclude: vec!["n3".to_owned()],
        gpu_type: Some("h100".to_owned()),
        options: vec!["--reservation=x".to_owned(), "--comment=a b".to_owned()],
        time_limit_minutes: Some(60),
        warning_s: 300,
        ..slurm()
    };
    let site = Site {
        modules: vec!["cuda/13".to_owned()],
        environment: BTreeMap::from([("OMP_NUM_THREADS".to_owned(), "1".to_owned())]),
        setup: vec!["source /etc/site.sh".to_owned()],
        ..site(slurm)
    };
    let request = JobRequest {
        dependency: Some(Dependency::AfterFailure(JobId::whole(41))),
        exclude: vec!["n7".to_owned(), "n3".to_owned()],
        survives_node_loss: true,
        ..request()
    };
    check(&request, &resources, &site, SEVERAL_NODES);
}

#[test]
fn an_array_in_a_container() {
    let container = Container { image: "/images/torch.sqsh".to_owned(), mounts: vec!["/data:/data:ro".to_owned()] };
    let resources = Resources { gpus_per_node: 1, cpus_per_worker: Some(4), container: Some(container), ..resources() };
    let request = JobRequest {
        command: ["/shared/study/bin/cloze", "sweep", "element", "/shared/study"].map(str::to_owned).to_vec(),
        array: Some(ArrayRange { elements: "0-9".to_owned(), limit: Some(4) }),
        dependency: Some(Dependency::AfterEnd(JobId::whole(41))),
        in_container: true,
        ..request()
    };
    check(
        &request,
        &resources,
        &site(slurm()),
        "\
#!/bin/bash
#SBATCH --job-name=cloze-first-1
#SBATCH --chdir=/shared/runs/first
#SBATCH --output=/shared/runs/first/logs/job-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --array=0-9%4
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --gres=gpu:1
#SBATCH --signal=B:USR2@120
#SBATCH --requeue
#SBATCH --dependency=afterany:41

exec srun --nodes=1 --ntasks=1 --overlap --mem=0 --cpu-bind=none --export=ALL --cpus-per-task=4 \
--container-image=/images/torch.sqsh --container-mounts=/data:/data:ro,/shared/runs/first:/shared/runs/first \
/shared/study/bin/cloze sweep element /shared/study
",
    );
}

#[test]
fn what_would_break_the_script_is_refused() {
    let good = (request(), resources(), site(slurm()));
    let cases: [(&str, JobRequest, Resources, Site); 6] = [
        ("control", JobRequest { command: vec!["a\nb".to_owned()], ..request() }, resources(), good.2.clone()),
        ("control", request(), Resources { setup: vec!["a\nb".to_owned()], ..resources() }, good.2.clone()),
        (
            "variable",
            request(),
            Resources { environment: BTreeMap::from([("A B".to_owned(), String::new())]), ..resources() },
            good.2.clone(),
        ),
        ("quote", request(), resources(), site(SlurmSite { partition: Some("a\"b".to_owned()), ..slurm() })),
        ("absolute", JobRequest { folder: PathBuf::from("runs/first"), ..request() }, resources(), good.2.clone()),
        ("no SLURM", request(), resources(), Site { kind: SiteKind::Local, ..good.2.clone() }),
    ];
    for (word, request, resources, site) in cases {
        let failure = render(&request, &resources, &site, version()).unwrap_err();
        assert!(failure.what.contains(word), "{failure}");
    }
    assert!(render(&good.0, &good.1, &good.2, version()).is_ok());
}
