//! Flows and tokens that a balancer has lost (a reboot, another machine), from what its backends tell.

use std::sync::Arc;
use std::time::Duration;

use aya::maps::{MapError, PerCpuValues};
use nix::time::{ClockId, clock_gettime};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;

use crate::abi::{Address, COUNTERS, FLOW_SYN_SEEN, TokenKey, TokenSlots, Tuple};
use crate::plane::Maps;
use crate::report::{Flow, Question};
use crate::{Error, Result, abi};

/// From a failure to the next try.
const AGAIN: Duration = Duration::from_secs(5);
/// `BPF_NOEXIST`
const NEW_ONLY: u64 = 1;

/// What the agent of a backend, named `SERVICE/BACKEND`, has told.
#[derive(Debug)]
pub struct Answer {
    /// Whose.
    pub backend: String,
    /// Its flows.
    pub flows: Result<Vec<Flow>>,
}

/// Asks the agent of one backend; dropping it ends that.
#[derive(Debug)]
pub struct Asker {
    question: Question,
    again: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Asker {
    /// Asks until there is an answer, and again at each [`Asker::again`]. Tells `to` all answers, and of failures the
    /// first and those that differ from the one before.
    pub fn start(backend: String, question: Question, to: mpsc::UnboundedSender<Answer>) -> Self {
        let again = Arc::new(Notify::new());
        let task = tokio::spawn(watch(backend, question.clone(), Arc::clone(&again), to));
        Asker { question, again, task }
    }

    /// Would an asker of this question do the same?
    pub fn same(&self, question: &Question) -> bool {
        self.question == *question
    }

    /// The backend has come back.
    pub fn again(&self) {
        self.again.notify_one();
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn watch(backend: String, question: Question, again: Arc<Notify>, to: mpsc::UnboundedSender<Answer>) {
    let mut last = None;
    loop {
        let flows = question.ask().await;
        let failure = flows.as_ref().err().map(ToString::to_string);
        let news = failure.is_none() || failure != last;
        if news && to.send(Answer { backend: backend.clone(), flows }).is_err() {
            return;
        }
        last = failure;
        match last {
            None => again.notified().await,
            Some(_) => tokio::time::sleep(AGAIN).await,
        }
    }
}

/// Writes into the tables that these flows to a service are on this backend, where they say nothing of them yet. How many
/// flows and tokens were new.
pub fn write(maps: &mut Maps, service: u32, by_token: bool, backend: u32, told: &[Flow]) -> Result<[u64; 2]> {
    let failed = |error: MapError| Error::bpf("write the balancer's maps", error);
    let seen = clock_gettime(ClockId::CLOCK_MONOTONIC).map_err(|e| Error::io("read the clock", e))?.tv_sec();
    let entry = abi::Flow { backend, seen: seen as u32, flags: FLOW_SYN_SEEN, tick: 0, sequence: 0 };
    let mut made = [0; 2];
    for flow in told {
        let tuple = Tuple {
            source: flow.client.ip().into(),
            destination: flow.service.ip().into(),
            source_port: flow.client.port().to_be(),
            destination_port: flow.service.port().to_be(),
        };
        made[0] += u64::from(is_new(maps.flows.insert(tuple, entry, NEW_ONLY)).map_err(failed)?);
        let Some(token) = flow.token.filter(|_| by_token) else { continue };
        let key = TokenKey { token: token.0.to_be(), service };
        let client = Address::from(flow.client.ip());
        let slots =
            TokenSlots { newer: backend, newer_client: client, older: 0, older_client: Address::default() };
        if is_new(maps.tokens.insert(key, slots, NEW_ONLY)).map_err(failed)? {
            made[1] += 1;
            continue;
        }
        // Two connections on two backends may have the same token.
        match maps.tokens.get(&key, 0) {
            Ok(known) if known.newer != backend && known.older == 0 => {
                let both = TokenSlots { older: backend, older_client: client, ..known };
                maps.tokens.insert(key, both, 0).map_err(failed)?;
            }
            _ => {}
        }
    }
    for (name, made) in ["flows_told", "tokens_told"].into_iter().zip(made) {
        let index = COUNTERS.iter().position(|(counter, _)| *counter == name).expect("a counter") as u32;
        // Counted here alone, so that no processor counts meanwhile.
        let mut values = maps.counters.get(&index, 0).map_err(failed)?.to_vec();
        values[0] += made;
        let values = PerCpuValues::try_from(values).map_err(|e| Error::io("write counters", e))?;
        maps.counters.set(index, values, 0).map_err(failed)?;
    }
    Ok(made)
}

fn is_new(inserted: Result<(), MapError>) -> Result<bool, MapError> {
    match inserted {
        Ok(()) => Ok(true),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == std::io::ErrorKind::AlreadyExists => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}
