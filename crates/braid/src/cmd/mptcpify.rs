//! `braid mptcpify`: every TCP socket of the host or of a control group.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use launch::mptcpify::Mptcpify;

use super::{END, block_on, ensure_mptcp, signalled};
use crate::output;

/// Make new TCP sockets of all programs, or of a control group, MPTCP
///
/// Until this ends. By a BPF program in the kernel (Linux 6.6 and newer): nothing is preloaded, and programs that run already take part
/// with the sockets that they make from now on. Needs root, and a kernel that allows it; `braid run` needs neither.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  braid mptcpify
  braid mptcpify --cgroup /sys/fs/cgroup/system.slice/nginx.service")]
pub struct Args {
    /// Only for programs in this control group (version 2) and those below it
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
}

pub fn run(args: Args) -> Result<ExitCode> {
    ensure_mptcp(&mptcp::Netns::current()?)?;
    block_on(async {
        let end = signalled(END)?;
        let _undone_at_the_end = Mptcpify::start(args.cgroup.as_deref())?;
        let whose = args.cgroup.map_or("the host".into(), |group| group.display().to_string());
        output::note(format_args!("new TCP sockets of {whose} are MPTCP ones until this ends"));
        end.await;
        Ok(ExitCode::SUCCESS)
    })
}
