//! Does a backend serve? It is asked again and again; some answers in a row change the verdict.

use std::net::SocketAddr;
use std::time::Duration;

use mptcp::socket::{self, Options, Protocol};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::config::{Check, CheckKind};

/// A verdict on a backend, named `SERVICE/BACKEND`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whose.
    pub backend: String,
    /// Does it serve?
    pub up: bool,
    /// Why not.
    pub reason: String,
}

/// Checks of one backend; dropping it ends them.
#[derive(Debug)]
pub struct Checker {
    check: Check,
    target: SocketAddr,
    task: JoinHandle<()>,
}

impl Checker {
    /// Asks `target` at once and then at every interval, and tells `to` the first verdict and each that differs from the
    /// one before.
    pub fn start(
        backend: String,
        target: SocketAddr,
        check: Check,
        to: mpsc::UnboundedSender<Verdict>,
    ) -> Self {
        let task = tokio::spawn(watch(backend, target, check.clone(), to));
        Checker { check, target, task }
    }

    /// Would a checker of this target and kind do the same?
    pub fn same(&self, target: SocketAddr, check: &Check) -> bool {
        self.target == target && self.check == *check
    }
}

impl Drop for Checker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn watch(backend: String, target: SocketAddr, check: Check, to: mpsc::UnboundedSender<Verdict>) {
    let mut judge = Judge::new(check.rise, check.fall);
    loop {
        let answer = ask(target, &check).await;
        if let Some(up) = judge.hear(answer.is_ok()) {
            let verdict = Verdict { backend: backend.clone(), up, reason: answer.err().unwrap_or_default() };
            if to.send(verdict).is_err() {
                return;
            }
        }
        tokio::time::sleep(check.interval).await;
    }
}

/// Counts answers. The first one decides; later a change needs `rise` good or `fall` bad ones in a row.
struct Judge {
    rise: u32,
    fall: u32,
    up: Option<bool>,
    against: u32,
}

impl Judge {
    fn new(rise: u32, fall: u32) -> Self {
        Judge { rise, fall, up: None, against: 0 }
    }

    /// The verdict, where it is a new one.
    fn hear(&mut self, good: bool) -> Option<bool> {
        let needed = match self.up {
            None => 1,
            Some(up) if up == good => {
                self.against = 0;
                return None;
            }
            Some(true) => self.fall,
            Some(false) => self.rise,
        };
        self.against += 1;
        if self.against < needed {
            return None;
        }
        self.against = 0;
        self.up = Some(good);
        self.up
    }
}

/// One check; an error says what was wrong with the answer.
async fn ask(target: SocketAddr, check: &Check) -> Result<(), String> {
    let asked = tokio::time::timeout(check.timeout, ask_patiently(target, check)).await;
    asked.unwrap_or_else(|_elapsed| Err(format!("no answer in {:?}", check.timeout)))
}

async fn ask_patiently(target: SocketAddr, check: &Check) -> Result<(), String> {
    let protocol = match check.kind {
        CheckKind::None => return Ok(()),
        CheckKind::Mptcp => Protocol::Mptcp,
        CheckKind::Tcp | CheckKind::Http => Protocol::Tcp,
    };
    let options = Options { protocol, ..Options::default() };
    let mut stream = socket::dial(&target.to_string(), &options).await.map_err(|error| error.to_string())?;
    match check.kind {
        CheckKind::None | CheckKind::Tcp => Ok(()),
        CheckKind::Mptcp => match mptcp::info::of(&stream) {
            Ok(info) if info.is_mptcp() => Ok(()),
            Ok(_) => Err("accepts TCP only".into()),
            Err(error) => Err(error.to_string()),
        },
        CheckKind::Http => {
            let request = format!(
                "GET {} HTTP/1.1\r\nHost: {target}\r\nUser-Agent: braid-lb\r\nConnection: close\r\n\r\n",
                check.path
            );
            stream.write_all(request.as_bytes()).await.map_err(|error| error.to_string())?;
            // `HTTP/1.1 200`
            let mut head = [0; 12];
            stream.read_exact(&mut head).await.map_err(|error| error.to_string())?;
            match &head {
                [b'H', b'T', b'T', b'P', b'/', _, b'.', _, b' ', b'2' | b'3', _, _] => Ok(()),
                _ => Err(format!("answers {}", String::from_utf8_lossy(&head).escape_debug())),
            }
        }
    }
}

/// Longest time until each checker has told its first verdict.
pub fn patience<'c>(checks: impl Iterator<Item = &'c Check>) -> Duration {
    checks.map(|check| check.timeout).max().unwrap_or_default() + Duration::from_secs(1)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn the_first_answer_decides_and_later_some_in_a_row() {
        let mut judge = Judge::new(2, 3);
        let mut hear = |answers: &[bool]| answers.iter().filter_map(|good| judge.hear(*good)).last();
        assert_eq!(hear(&[true]), Some(true));
        assert_eq!(hear(&[false, false, true, false, false]), None);
        assert_eq!(hear(&[false]), Some(false));
        assert_eq!(hear(&[true, false, true]), None);
        assert_eq!(hear(&[true]), Some(true));
    }

    async fn answers(reply: &'static [u8], kind: CheckKind) -> Result<(), String> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 1024];
            let length = if kind == CheckKind::Http { stream.read(&mut request).await.unwrap() } else { 0 };
            stream.write_all(reply).await.unwrap();
            String::from_utf8(request[..length].to_vec()).unwrap()
        });
        let check = Check { kind, path: "/up".into(), timeout: Duration::from_secs(20), ..Check::default() };
        let answer = ask(target, &check).await;
        let request = server.await.unwrap();
        assert!(
            kind != CheckKind::Http || request.starts_with("GET /up HTTP/1.1\r\nHost: 127.0.0.1:"),
            "{request}"
        );
        answer
    }

    #[tokio::test]
    async fn http_is_up_where_the_status_is_good() {
        assert_eq!(answers(b"HTTP/1.1 200 OK\r\n\r\n", CheckKind::Http).await, Ok(()));
        assert_eq!(answers(b"HTTP/1.0 301 Moved\r\n\r\n", CheckKind::Http).await, Ok(()));
        let refused = answers(b"HTTP/1.1 503 Busy\r\n\r\n", CheckKind::Http).await.unwrap_err();
        assert_eq!(refused, "answers HTTP/1.1 503");
        assert!(answers(b"HTTP", CheckKind::Http).await.is_err());
    }

    #[tokio::test]
    async fn a_listener_that_speaks_tcp_only_is_not_an_mptcp_backend() {
        assert_eq!(answers(b"", CheckKind::Tcp).await, Ok(()));
        assert_eq!(answers(b"", CheckKind::Mptcp).await, Err("accepts TCP only".into()));
    }

    fn often(kind: CheckKind) -> Check {
        let (interval, timeout) = (Duration::from_millis(5), Duration::from_secs(20));
        Check { kind, interval, timeout, rise: 3, fall: 2, ..Check::default() }
    }

    #[tokio::test]
    async fn a_backend_goes_down_after_fall_bad_answers_and_up_after_rise_good_ones() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = listener.local_addr().unwrap();
        // Answers yet to be given: good, bad, and then good ones only.
        let mut plan = [vec![true, false, true, false, false], vec![true, true, false]].concat().into_iter();
        let given = Arc::new(Mutex::new(Vec::new()));
        let record = Arc::clone(&given);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let good = plan.next().unwrap_or(true);
                record.lock().unwrap().push(good);
                let _ = stream.read(&mut [0; 1024]).await;
                let reply: &[u8] = if good { b"HTTP/1.1 204 Up\r\n\r\n" } else { b"HTTP/1.1 503 No\r\n\r\n" };
                let _ = stream.write_all(reply).await;
            }
        });
        let (to, mut verdicts) = mpsc::unbounded_channel();
        let _checker = Checker::start("web/app".into(), target, often(CheckKind::Http), to);
        for (up, answers) in [(true, 1), (false, 5), (true, 11)] {
            let verdict = verdicts.recv().await.unwrap();
            assert_eq!(verdict.up, up);
            assert_eq!(verdict.reason, if up { "" } else { "answers HTTP/1.1 503" });
            // More may have been given since.
            let given = given.lock().unwrap().len();
            assert!(given >= answers, "{up} after {given}");
        }
    }

    #[tokio::test]
    async fn a_service_that_ends_and_comes_back_is_down_and_up() {
        for (kind, protocol) in [(CheckKind::Tcp, Protocol::Tcp), (CheckKind::Mptcp, Protocol::Mptcp)] {
            // An address of its own, so that nobody else takes the port meanwhile.
            let options = Options { protocol, ..Options::default() };
            let listener = socket::listen("127.83.4.1:0".parse().unwrap(), &options).unwrap();
            let target = listener.local_addr().unwrap();
            let (to, mut verdicts) = mpsc::unbounded_channel();
            let _checker = Checker::start("web/app".into(), target, often(kind), to);
            assert!(verdicts.recv().await.unwrap().up);
            drop(listener);
            let verdict = verdicts.recv().await.unwrap();
            assert!(!verdict.up && !verdict.reason.is_empty(), "{verdict:?}");
            let _listener = socket::listen(target, &options).unwrap();
            assert!(verdicts.recv().await.unwrap().up);
        }
    }

    #[tokio::test]
    async fn a_closed_port_is_down() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = listener.local_addr().unwrap();
        drop(listener);
        let error =
            ask(target, &Check { timeout: Duration::from_secs(20), ..Check::default() }).await.unwrap_err();
        assert!(error.contains("refused"), "{error}");
    }
}
