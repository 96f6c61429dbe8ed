#!/bin/bash
# docs/slurm_array.sh on a real SLURM: one node, its daemons in a temporary folder, ended afterwards. A quarter of an hour;
# not a part of CI. Needs slurmctld, slurmd, munged (Debian: apt-get install slurm-wlm munge) and thalweg with its test extra:
#
#     bash tests/slurm/try_slurm.sh [FOLDER]        FOLDER keeps everything; default: a new one under /tmp
#
# What is tried: restarts that outlast a walltime of one minute get SIGTERM before it, go back into the queue and end with
# the rows of a run in one go; so does one whose processes got SIGKILL and that somebody requeues; a task that somebody
# cancelled stays away, and submitting again goes on with it; where tasks may not requeue themselves, arrays in a row do the
# same; a calculator that starts its program with srun, and a program that hangs. Prints one line for each and a verdict.
set -u
here=$(cd "$(dirname "$0")" && pwd)
script=$here/../../docs/slurm_array.sh
PATH=$PATH:/usr/sbin:/sbin
for program in munged slurmctld slurmd sbatch thalweg; do
    command -v "$program" > /dev/null || { echo "$program is not installed" >&2; exit 2; }
done
work=${1:-$(mktemp -d /tmp/try-slurm.XXXXXX)}
mkdir -p "$work"/{spool,state} || exit 2
work=$(cd "$work" && pwd)
cd "$work" || exit 2
unset "${!SLURM_@}" "${!SBATCH_@}"
host=$(hostname -s)
me=$(id -un)

# ---- the cluster: one node, two processors whatever the machine has
cat > slurm.conf << END
ClusterName=trial
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
CredType=cred/munge
# a job that is requeued waits as long as a credential lives, by default two minutes
AuthInfo=socket=$work/munge.socket,cred_expire=5
SlurmctldPort=17817
SlurmdPort=17818
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=3600
OverTimeLimit=0
KillWait=30
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 RealMemory=16000 State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=60 State=UP
END
export SLURM_CONF=$work/slurm.conf
dd if=/dev/urandom of=munge.key bs=1 count=1024 status=none
chmod 400 munge.key
chmod go-w . # munged wants it so

daemons=()
finish() {
    for pid in "${daemons[@]}"; do kill "$pid" 2> /dev/null; done
    wait 2> /dev/null
    echo "logs and run folders: $work"
}
trap finish EXIT
munged --foreground --force --socket="$work/munge.socket" --key-file="$work/munge.key" --pid-file="$work/munged.pid" \
    --seed-file="$work/munged.seed" --log-file="$work/munged.log" --num-threads=2 > munged.out 2>&1 &
daemons+=($!)
for _ in $(seq 50); do [ -S munge.socket ] && break; sleep 0.2; done
slurmctld -D -c > slurmctld.out 2>&1 &
daemons+=($!)
slurmd -D > slurmd.out 2>&1 &
daemons+=($!)
for _ in $(seq 60); do [ "$(sinfo -h -o %T 2> /dev/null)" = idle ] && break; sleep 1; done
if [ "$(sinfo -h -o %T)" != idle ]; then
    echo "the cluster does not start; see $work/slurmctld.log and slurmd.log" >&2
    exit 2
fi
echo "SLURM $(sinfo --version | cut -d' ' -f2) is up: $(sinfo -h -N -o '%N, %c processors')"

# ---- what is run: evaluations of 0.3 s each, so that a restart of the first kind takes a minute and a half
cat > own.py << 'END'
import time

from ase.calculators.emt import EMT


class Slow(EMT):
    def __init__(self, delay=0.0):
        super().__init__()
        self.delay = delay

    def calculate(self, *arguments, **options):
        time.sleep(self.delay)
        super().calculate(*arguments, **options)
END
for case in walltime:40 kills:14; do
    cat > "${case%:*}.toml" << END
[problem]
symbols = "Au2Ni2"
cell = 12.0
box = 5.0
[calculator]
name = "own:Slow"
delay = 0.3
[search]
method = "random_search"
iterations = ${case#*:}
restarts = 3
steps = 6
target = { energy = 5.7, tolerance = 0.5 }
END
done

wrong=0
say() { # say WORDS COMMAND...: whether the command succeeds
    local words=$1
    shift
    if "$@"; then echo "right: $words"; else echo "WRONG: $words"; wrong=1; fi
}
until_true() { # until_true SECONDS COMMAND...
    local end=$((SECONDS + $1))
    shift
    until "$@"; do [ "$SECONDS" -lt "$end" ] || return 1; sleep 1; done
}
queue_is_empty() { [ -z "$(squeue -h -r -o %i)" ]; }
state_of() { squeue -h -t all -r -j "$1" -o %T 2> /dev/null; }
restarts_of() { scontrol show job "$1" | sed -n 's/.*Restarts=\([0-9]*\).*/\1/p' | head -1; }
evaluations() { # evaluations FOLDER RESTART: so many are stored, 0 if there is no store
    python - "$1" "$2" << 'END'
import sys
from pathlib import Path
from thalweg.store import read
store = Path(sys.argv[1]) / "restarts" / f"{int(sys.argv[2]):03d}" / "store.journal"
print(len(read(store).rows) if store.is_file() else 0)
END
}
has_evaluations() { [ "$(evaluations "$1" "$2")" -ge "$3" ]; }
same_as_straight() { # same_as_straight FILE.toml FOLDER RESTART...: rows equal, bit for bit, those of a run in one go
    python - "$here/.." "$@" << 'END'
import sys
sys.path[:0] = [sys.argv[1], "."]
from pathlib import Path
from toys import same_rows
from thalweg.config import Configuration
from thalweg.store import read
configuration = Configuration.load(sys.argv[2], overrides=["calculator.delay=0.0"])
same = True
for index in map(int, sys.argv[4:]):
    straight = Path(f"straight-{sys.argv[3]}-{index}.journal")
    straight.unlink(missing_ok=True)
    with configuration.make_search(seed=index, store=straight) as search:
        search.run(configuration.search.iterations)
    there, here = read(straight).rows, read(Path(sys.argv[3]) / "restarts" / f"{index:03d}" / "store.journal").rows
    print(f"       restart {index}: {len(here)} evaluations, {len(there)} in one go")
    same = same and same_rows(there, here)
sys.exit(0 if same else 1)
END
}
submit() { THALWEG_SBATCH="$1" bash "$script" "$2" "$3" 3 | sed "s/.*: job \([0-9]*\), then.*/\1/"; } # the number of the array
# A signal comes up to a minute before its time, when SLURM looks at its jobs; with --time=1 it comes at once or soon.
export THALWEG_GRACE=10
limit="--time=1 --signal=B:TERM@15"

echo "== a walltime of one minute, three restarts of a minute and a half, two processors"
array=$(submit "$limit" walltime.toml walltime )
until_true 600 queue_is_empty
for index in 0 1 2; do
    say "restart $index was requeued ($(restarts_of "${array}_$index") times) and completed" \
        [ "$(restarts_of "${array}_$index")" -ge 1 -a "$(state_of "${array}_$index")" = COMPLETED ]
    say "restart $index was stopped by SIGTERM" grep -q "stopped (SIGTERM)" "thalweg-${array}_$index.log"
done
say "no walltime was overrun" bash -c "! grep -l 'DUE TO TIME LIMIT' thalweg-${array}_*.log"
say "the rows are those of runs in one go" same_as_straight walltime.toml walltime 0 1 2
say "the last job wrote the report" test -s walltime/report.html

echo "== kills: restart 0 gets SIGKILL and is requeued by hand, 1 is cancelled"
array=$(submit "--time=10" kills.toml kills )
until_true 60 has_evaluations kills 0 10
until_true 60 has_evaluations kills 1 5
pids=$(pgrep -f "thalweg run kills.toml .*--restart-index 0" | tr '\n' ' ')
parents=$(for pid in $pids; do ps -o ppid= -p "$pid"; done | tr '\n' ' ')
# shellcheck disable=SC2086  # several numbers
kill -KILL $parents $pids
scancel "${array}_1"
say "restart 0 failed" until_true 60 eval '[ "$(state_of "'"${array}_0"'")" = FAILED ]'
say "restart 1 is cancelled" until_true 60 eval '[ "$(state_of "'"${array}_1"'")" = CANCELLED ]'
kept=$(evaluations kills 0)
say "what restart 0 had evaluated is kept ($kept evaluations)" [ "$kept" -ge 10 ]
say "requeue by hand" scontrol requeue "${array}_0"
until_true 300 queue_is_empty
say "restart 0 has completed, after $(restarts_of "${array}_0") requeue" [ "$(state_of "${array}_0")" = COMPLETED ]
say "restart 1 has not come back" [ "$(state_of "${array}_1")" = CANCELLED -a "$(restarts_of "${array}_1")" = 0 ]
say "the rows are those of runs in one go" same_as_straight kills.toml kills 0 2
echo "== the same again: goes on with what is not finished"
submit "--time=10" kills.toml kills > /dev/null
until_true 300 queue_is_empty
say "the rows are those of runs in one go" same_as_straight kills.toml kills 0 1 2
say "the last job wrote the report" test -s kills/report.html

echo "== no requeues: arrays in a row"
export THALWEG_MOST_REQUEUES=0 THALWEG_ROUNDS=6
submit "$limit" walltime.toml rounds > /dev/null
until_true 900 queue_is_empty
unset THALWEG_MOST_REQUEUES THALWEG_ROUNDS
say "it took more than one array" test "$(grep -l 'stopped (SIGTERM)' $(grep -l 'run folder: rounds' thalweg-*.log) | wc -l)" -ge 3
say "the rows are those of runs in one go" same_as_straight walltime.toml rounds 0 1 2

echo "== a program under srun, once it hangs"
cp "$here"/../poor_calculators.py "$here"/../toys.py .
cat > program.py << END
$(cd "$here/.." && python -c "import poor_calculators; print(poor_calculators.PROGRAM)")
try:
    os.close(os.open("$work/hung", os.O_CREAT | os.O_EXCL))
except FileExistsError:
    pass
else:
    import time
    time.sleep(1000)
END
cat > srun.toml << END
[problem]
symbols = "Au2Ni2"
cell = 12.0
box = 5.0
[calculator]
name = "poor_calculators:with_files"
program = "$work/program.py"
launcher = "srun --exact -n 1"
timeout = 20
scratch = "$work/scratch"
[search]
method = "random_search"
iterations = 2
restarts = 3
steps = 2
END
submit "--time=10" srun.toml srun > /dev/null
until_true 600 queue_is_empty
count() { # count STATUS: evaluations of all restarts that have it
    python - "$1" << 'END'
import sys
from thalweg.campaign import load_results
print(sum(int((h.rows.columns["status"] == int(sys.argv[1])).sum()) for h in load_results("srun").histories.values()))
END
}
say "one evaluation failed" [ "$(count 1)" = 1 ]
say "the others did not ($(count 0))" [ "$(count 0)" -ge 10 ]
say "the reason is the timeout" grep -q "timeout of 20 s" thalweg-*.log
say "nothing is left of the program that hung" [ -z "$(pgrep -f "python.*$work/program.py")" ]
say "no scratch folder is left" bash -c "! ls scratch | grep -q ."

if [ "$wrong" = 0 ]; then echo "verdict: all right"; else echo "verdict: WRONG"; fi
exit "$wrong"
