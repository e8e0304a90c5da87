"""SLURM of the lab: munge, a controller on the login node, and the configuration that every host reads."""

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

# Keys whose value is not the default, and why:
#   cred_expire: a job that is requeued stays pending for this long; the default is two minutes.
#   config_overrides: a node may have more CPUs than the machine.
#   linuxproc, task/none, gather none, CgroupPlugin: containers often have no cgroup file system that can be written.
#   PropagateResourceLimits: without CAP_SYS_RESOURCE the limits of the login node cannot be set on a host.
#   No SchedulerParameters word may contain "defer": every one of them turns deferral on.
_CONFIGURATION = """ClusterName=lab
SlurmctldHost=login({login})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmdSpoolDir={folder}/run/spool.%n
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.log
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PropagateResourceLimits=NONE
ReturnToService=2
KillWait=5
MinJobAge=300
SlurmctldTimeout=30
SlurmdTimeout=15
MessageTimeout=5
BatchStartTimeout=10
"""


@dataclass(frozen=True)
class SlurmOptions:
    """Nodes of the SLURM cluster."""

    hosts: int
    cpus: int
    gpus: int
    further: str  # lines of slurm.conf that come last; a key given again replaces the lab's own


def write_configuration(folder: Path, options: SlurmOptions, *, login: str, network: str) -> None:
    """Write slurm.conf, cgroup.conf and, with GPUs, gres.conf and the device files they name."""
    lines = _CONFIGURATION.format(folder=folder, login=login).splitlines()
    given = {line.split("=")[0].lower() for line in options.further.splitlines()}
    lines = [line for line in lines if line.split("=")[0].lower() not in given]
    gres = f" Gres=gpu:{options.gpus}" if options.gpus else ""
    nodes = f"n[1-{options.hosts}]"
    if gres:
        lines.append("GresTypes=gpu")
        devices = folder / "dev"
        devices.mkdir(exist_ok=True)
        for index in range(options.gpus):
            # The numbers of /dev/null: something that can be opened.
            subprocess.run(["mknod", str(devices / f"nvidia{index}"), "c", "1", "3"], check=True)
        (folder / "gres.conf").write_text(f"Name=gpu File={devices}/nvidia[0-{options.gpus - 1}]\n")
    place = f"NodeName={nodes} NodeAddr={network}.[1-{options.hosts}]"
    lines.append(f"{place} CPUs={options.cpus} RealMemory=8000{gres} State=UNKNOWN")
    lines.append(f"PartitionName=main Nodes={nodes} Default=YES MaxTime=INFINITE DefaultTime=10 State=UP")
    (folder / "slurm.conf").write_text("\n".join([*lines, options.further]) + "\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")


def start_controller(folder: Path) -> None:
    """Start munged, which every host reaches by its socket's path, and slurmctld."""
    munge = folder / "munge"
    munge.mkdir(exist_ok=True)
    (folder / "state").mkdir(exist_ok=True)
    key = munge / "key"
    if not key.exists():
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
    options = {"key-file": key, "socket": munge / "socket", "pid-file": munge / "pid", "seed-file": munge / "seed"}
    words = [f"--{name}={path}" for name, path in options.items()]
    subprocess.run(["munged", "--force", *words, f"--log-file={folder}/log/munged.log"], check=True)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    while not (munge / "socket").exists():
        time.sleep(0.01)
    subprocess.run(["slurmctld", "-c", "-i"], env=environment, check=True)
