//! What processes have used, as Linux tells it in `/proc`.

use std::{fs, ops::Sub, time::Duration};

use anyhow::Context;
use nix::unistd::{SysconfVar, sysconf};

/// CPU time, user and system.
#[derive(Debug, Clone, Copy, Default)]
pub struct Usage {
    pub service: Duration,
    pub database: Duration,
    pub generator: Duration,
}

impl Sub for Usage {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            service: self.service.saturating_sub(before.service),
            database: self.database.saturating_sub(before.database),
            generator: self.generator.saturating_sub(before.generator),
        }
    }
}

/// Who is looked at.
#[derive(Debug, Clone, Copy)]
pub struct Meter {
    /// The service; none if pgbench makes the load.
    pub service: Option<u32>,
    pub postmaster: u32,
}

impl Meter {
    /// What has been used until now.
    pub fn read(&self) -> anyhow::Result<Usage> {
        let own = CpuTime::of("self")?;
        let postmaster = CpuTime::of(self.postmaster)?;
        let mut database = postmaster.own + postmaster.ended_children;
        for child in children(self.postmaster)? {
            // One that has ended meanwhile is counted the next time.
            database += CpuTime::of(child).map_or(Duration::ZERO, |child| child.own);
        }
        Ok(match self.service {
            Some(pid) => Usage { service: CpuTime::of(pid)?.own, database, generator: own.own },
            None => Usage { service: Duration::ZERO, database, generator: own.ended_children },
        })
    }
}

struct CpuTime {
    own: Duration,
    ended_children: Duration,
}

impl CpuTime {
    fn of(process: impl std::fmt::Display) -> anyhow::Result<Self> {
        let ticks_per_second = sysconf(SysconfVar::CLK_TCK)?.context("no clock tick")?;
        let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
        // The name in parentheses may contain anything, so count from its end:
        // the next field is the third, and utime is the fourteenth.
        let (_, fields) = stat.rsplit_once(')').context("not a stat file")?;
        let ticks: Vec<f64> =
            fields.split_whitespace().skip(11).take(4).map(str::parse).collect::<Result<_, _>>()?;
        let [utime, stime, cutime, cstime] = ticks.try_into().ok().context("not a stat file")?;
        let time = |ticks: f64| Duration::from_secs_f64(ticks / ticks_per_second as f64);
        Ok(Self { own: time(utime + stime), ended_children: time(cutime + cstime) })
    }
}

/// PostgreSQL's processes are all children of its first one.
fn children(pid: u32) -> anyhow::Result<Vec<u32>> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    Ok(children.split_whitespace().map(str::parse).collect::<Result<_, _>>()?)
}

/// Resident memory in MiB.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    pub now: f64,
    /// The most that there was since the last [`Memory::forget_peak`].
    pub peak: f64,
}

impl Memory {
    pub fn forget_peak(pid: u32) -> anyhow::Result<()> {
        Ok(fs::write(format!("/proc/{pid}/clear_refs"), "5")?)
    }

    pub fn of(pid: u32) -> anyhow::Result<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let mib = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).context("no such field")?;
            let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
            anyhow::Ok(kib / 1024.0)
        };
        Ok(Self { now: mib("VmRSS:")?, peak: mib("VmHWM:")? })
    }
}

/// Which machine this is, and which PostgreSQL.
pub fn machine(postgres_version: &str) -> anyhow::Result<String> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or(std::env::consts::ARCH, |(_, model)| model);
    let cores = std::thread::available_parallelism()?;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    Ok(format!("{model}, {cores} cores; Linux {}; PostgreSQL {postgres_version}", kernel.trim()))
}
