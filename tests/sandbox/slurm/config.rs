//! What the daemons of a cluster read.
//!
//! Every time is as short as SLURM 22.05 takes it: a node that says nothing is down after 14 to 16 s, and a requeued job starts again
//! after 6 s, when the credential of its first start has expired.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::SlurmOptions;
use crate::sandbox::Fleet;
use crate::sandbox::fleet::LOGIN;

/// Name of the cluster in its accounting.
pub const CLUSTER: &str = "test";
/// Port of the database on the login host; SLURM's own ports are the usual ones, since each host has all of its ports to itself.
const DATABASE_PORT: u16 = 3306;
/// Runs on each node of a job when it ends.
const EPILOG: &str = include_str!("epilog.sh");
/// Bytes of the secret by which the daemons know each other.
const KEY_BYTES: usize = 1024;

/// Writes all of it below a folder.
pub fn write(folder: &Path, options: &SlurmOptions, version: (u32, u32)) {
    let put = |name: &str, text: &str| fs::write(folder.join(name), text).expect("write a file of the cluster");
    put("etc/slurm.conf", &slurm_conf(folder, options));
    put("etc/gres.conf", &gres_conf(folder, options));
    // There are no cgroups here; slurmd looks for them all the same unless a plugin is named that it does not have to start.
    put("etc/cgroup.conf", if version < (23, 2) { "CgroupPlugin=cgroup/v1\n" } else { "CgroupPlugin=disabled\n" });
    put("etc/epilog.sh", EPILOG);
    set_mode(&folder.join("etc/epilog.sh"), 0o700);
    if options.accounting {
        put("etc/slurmdbd.conf", &slurmdbd_conf(folder));
        put("etc/mariadb.cnf", &mariadb_conf(folder));
        put("etc/accounting.sql", ACCOUNTING_SQL);
        // Daemons refuse secrets that others can read.
        set_mode(&folder.join("etc/slurmdbd.conf"), 0o600);
    }
    let mut key = [0; KEY_BYTES];
    fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut key)).expect("read random bytes");
    fs::write(folder.join("munge/key"), key).expect("write munge's key");
    set_mode(&folder.join("munge/key"), 0o600);
}

fn slurm_conf(folder: &Path, options: &SlurmOptions) -> String {
    let (place, login, remembers_s) = (folder.display(), Fleet::login_address(), options.remembers_s);
    let basics = format!(
        "ClusterName={CLUSTER}
SlurmctldHost={LOGIN}({login})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={place}/munge/socket,cred_expire=5
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool/%n
SlurmctldPidFile={place}/run/slurmctld.pid
SlurmdPidFile={place}/run/slurmd.%n.pid
SlurmctldLogFile={place}/log/slurmctld.log
SlurmdLogFile={place}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
Epilog={place}/etc/epilog.sh
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=100000
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MinJobAge={remembers_s}
InactiveLimit=0
UnkillableStepTimeout=15
JobRequeue=1
"
    );
    // Clients ask for another socket of munge unless it is named here, and wait for ever.
    let accounting = format!(
        "AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePass={place}/munge/socket
"
    );
    let gpus = if options.gpus_per_node > 0 { format!(" Gres=gpu:fake:{}", options.gpus_per_node) } else { String::new() };
    let node = |number: usize| format!("NodeName=n{number} NodeAddr={} CPUs=4 RealMemory=16000{gpus}\n", Fleet::node_address(number));
    let nodes: String = (1..=options.num_nodes).map(node).collect();
    let common = format!("Nodes=n[1-{}] MaxTime=INFINITE State=UP OverSubscribe=NO", options.num_nodes);
    let partitions = format!(
        "PartitionName=main {common} Default=YES PriorityTier=5 PreemptMode=OFF
PartitionName=spot {common} PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
PartitionName=urgent {common} PriorityTier=10 PreemptMode=OFF
"
    );
    let accounting = if options.accounting { accounting } else { String::new() };
    let resources = if options.gpus_per_node > 0 { "GresTypes=gpu\n" } else { "" };
    [basics.as_str(), &accounting, resources, &nodes, &partitions].concat()
}

fn gres_conf(folder: &Path, options: &SlurmOptions) -> String {
    let device = |gpu: usize| format!("NodeName=n[1-{}] Name=gpu Type=fake File={}/dev/gpu{gpu}\n", options.num_nodes, folder.display());
    (0..options.gpus_per_node).map(device).collect()
}

fn slurmdbd_conf(folder: &Path) -> String {
    let place = folder.display();
    format!(
        "AuthType=auth/munge
AuthInfo=socket={place}/munge/socket
DbdHost={LOGIN}
DbdAddr=127.0.0.1
SlurmUser=root
LogFile={place}/log/slurmdbd.log
PidFile={place}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={DATABASE_PORT}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
"
    )
}

/// Small and quick to start; what it holds is lost with the test.
fn mariadb_conf(folder: &Path) -> String {
    let place = folder.display();
    format!(
        "[mariadbd]
user=root
datadir={place}/mariadb
socket={place}/run/mariadb.sock
pid-file={place}/run/mariadb.pid
log-error={place}/log/mariadb.log
init-file={place}/etc/accounting.sql
bind-address=127.0.0.1
port={DATABASE_PORT}
skip-name-resolve
innodb_buffer_pool_size=64M
innodb_log_file_size=32M
innodb_lock_wait_timeout=900
innodb_flush_log_at_trx_commit=0
"
    )
}

/// Run by the database when it starts.
const ACCOUNTING_SQL: &str = "\
CREATE DATABASE IF NOT EXISTS slurm_acct_db;
CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';
";

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("change the mode of a file of the cluster");
}
