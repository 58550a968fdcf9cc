//! CPU time and memory of processes, read from `/proc`.

use std::{fs, time::Duration};

use anyhow::{Context, Result};
use nix::unistd::{SysconfVar, sysconf};

/// CPU time, user and system, of the service, the database and the load generator.
pub type Usage = [Duration; 3];

/// The processes whose CPU time counts.
#[derive(Debug, Clone, Copy)]
pub struct Meter {
    /// The service; `None` if pgbench makes the load.
    pub service: Option<u32>,
    pub postmaster: u32,
}

impl Meter {
    /// The CPU time used so far.
    pub fn read(&self) -> Result<Usage> {
        let own = CpuTime::of("self")?;
        let postmaster = CpuTime::of(self.postmaster)?;
        let mut database = postmaster.own + postmaster.ended_children;
        // PostgreSQL's processes are all children of the postmaster.
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.postmaster))?;
        for child in children.split_whitespace() {
            // A process that has ended meanwhile is in `ended_children` the next time.
            database += CpuTime::of(child).map_or(Duration::ZERO, |child| child.own);
        }
        Ok(match self.service {
            Some(pid) => [CpuTime::of(pid)?.own, database, own.own],
            None => [Duration::ZERO, database, own.ended_children],
        })
    }

    /// The CPU time used since a reading.
    pub fn since(&self, before: Usage) -> Result<Usage> {
        let mut used = self.read()?;
        used.iter_mut().zip(before).for_each(|(used, before)| *used = used.saturating_sub(before));
        Ok(used)
    }
}

struct CpuTime {
    own: Duration,
    ended_children: Duration,
}

impl CpuTime {
    fn of(process: impl std::fmt::Display) -> Result<Self> {
        let ticks_per_second = sysconf(SysconfVar::CLK_TCK)?.context("no clock tick")?;
        let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
        // The name in parentheses may contain anything, so fields are counted from its
        // end: the next one is the third, and utime is the fourteenth.
        let (_, fields) = stat.rsplit_once(')').context("not a stat file")?;
        let ticks: Vec<f64> =
            fields.split_whitespace().skip(11).take(4).map(str::parse).collect::<Result<_, _>>()?;
        let [utime, stime, cutime, cstime] = ticks.try_into().ok().context("not a stat file")?;
        let time = |ticks: f64| Duration::from_secs_f64(ticks / ticks_per_second as f64);
        Ok(Self { own: time(utime + stime), ended_children: time(cutime + cstime) })
    }
}

/// Resident memory of a process in MiB.
pub fn memory(pid: u32) -> Result<f64> {
    memory_field(pid, "VmRSS:")
}

/// The highest resident memory in MiB since the last [`reset_peak_memory`].
pub fn peak_memory(pid: u32) -> Result<f64> {
    memory_field(pid, "VmHWM:")
}

pub fn reset_peak_memory(pid: u32) -> Result<()> {
    Ok(fs::write(format!("/proc/{pid}/clear_refs"), "5")?)
}

fn memory_field(pid: u32, name: &str) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)).context("no such field")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib / 1024.0)
}

/// Processor, cores and kernel of this machine.
pub fn machine() -> Result<String> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or(std::env::consts::ARCH, |(_, model)| model);
    let cores = std::thread::available_parallelism()?;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    Ok(format!("{model}, {cores} cores; Linux {}", kernel.trim()))
}
