//! Asks whether anything comes through between two addresses: with a join to a connection that the peer cannot know, since
//! both its ends are here. The peer refuses it with a RST (RFC 8684 section 3.2), of which its programs see nothing.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;

use mptcp::pm::{Address, Client, EndpointFlags, Event, EventKind};
use mptcp::socket::{self, Options, canonical};
use mptcp::{AddrId, Netns, Token, diag, info};
use nix::errno::Errno;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use mptcp::Result;

/// A connection from this namespace to itself, whose further subflows are the questions.
pub(super) struct Scout {
    token: Token,
    /// Local addresses that were asked from; their places are their ids.
    from: Vec<IpAddr>,
    _ends: [TcpStream; 2],
}

impl Scout {
    /// Needs the userspace path manager in `netns`.
    pub(super) async fn new(netns: &Netns) -> Result<Self> {
        let options = Options { netns: Some(netns.clone()), ..Options::default() };
        // An IPv6 socket has subflows of both families; without IPv6, one of IPv4 will do.
        let loopback = |ip: &str| SocketAddr::new(ip.parse().expect("an address"), 0);
        let listener = socket::listen(loopback("::ffff:127.0.0.1"), &options)
            .or_else(|_| socket::listen(loopback("127.0.0.1"), &options))?;
        let failed = |e| mptcp::Error::io("connect to ourselves", e);
        let addr = listener.local_addr().map_err(failed)?;
        let (ours, accepted) = tokio::join!(socket::connect(addr, &options), listener.accept());
        let (mut ours, (mut theirs, _)) = (ours?, accepted.map_err(failed)?);
        // Joins need a peer that has proved its key, which it does with data.
        ours.write_all(b"x").await.map_err(failed)?;
        theirs.read_exact(&mut [0]).await.map_err(failed)?;
        theirs.write_all(b"x").await.map_err(failed)?;
        ours.read_exact(&mut [0]).await.map_err(failed)?;
        match info::of(&ours.as_fd())? {
            info::Status::Mptcp(info::Info { token: Some(token), .. }) => {
                Ok(Scout { token, from: Vec::new(), _ends: [ours, theirs] })
            }
            _ => Err(failed(io::Error::other("it fell back to TCP"))),
        }
    }

    /// Asks; [`Scout::answer`] knows the answer when it comes. The question before, between the same two, ends.
    pub(super) async fn ask(
        &mut self,
        netns: &Netns,
        client: &Client,
        local: IpAddr,
        ifindex: u32,
        remote: SocketAddr,
    ) -> Result<()> {
        let before = diag::connections_without_owners(netns).await?;
        let before = before.iter().filter(|c| c.token == self.token).flat_map(|c| &c.subflows);
        let same =
            |s: &&diag::Subflow| canonical(s.local).ip() == local && canonical(s.remote) == canonical(remote);
        for subflow in before.filter(same) {
            let end = |addr| Address::new(addr, None);
            // It may just have been refused.
            let _ = client.destroy_subflow(self.token, end(subflow.local), end(subflow.remote)).await;
        }
        let place = self.from.iter().position(|ip| *ip == local).unwrap_or_else(|| {
            self.from.push(local);
            self.from.len() - 1
        });
        let id = AddrId(u8::try_from(place + 1).unwrap_or(u8::MAX));
        let local = Address { ip: local, id: Some(id), port: 0, ifindex };
        client.create_subflow(self.token, local, Address::new(remote, None), EndpointFlags::empty()).await
    }

    /// The path that `event` tells of, if it tells that the peer has refused a question.
    pub(super) fn answer(&self, event: &Event) -> Option<(IpAddr, SocketAddr)> {
        let refused = event.kind == EventKind::SubflowClosed
            && event.token == Some(self.token)
            && event.error.map(i32::from).map(Errno::from_raw) == Some(Errno::ECONNREFUSED);
        let remote = SocketAddr::new(event.remote_ip?, event.remote_port?);
        refused.then_some((event.local_ip?.to_canonical(), canonical(remote)))
    }
}

#[cfg(test)]
mod tests {
    use mptcp::pm::{Events, Notice};

    use super::*;
    use crate::daemon::one_link;

    #[tokio::test]
    async fn a_path_answers_when_it_works_and_no_program_sees_the_question() {
        let lab = one_link().await;
        let here = lab.netns("here");
        let client = Client::connect(here).await.unwrap();
        let mut events = Events::subscribe(here).unwrap();
        let ifindex = here.run(|| nix::net::if_::if_nametoindex("eth0")).unwrap().unwrap();
        let mut scout = Scout::new(here).await.unwrap();
        for (from, to) in [("10.0.1.1", "10.0.1.2:80"), ("fd00::1", "[fd00::2]:80")] {
            let (from, to): (IpAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
            let there = Options { netns: Some(lab.netns("there").clone()), ..Options::default() };
            let listener = socket::listen(to, &there).unwrap();
            lab.link("wire").set_blackhole(true).unwrap();
            scout.ask(here, &client, from, ifindex, to).await.unwrap();
            lab.link("wire").set_blackhole(false).unwrap();
            // Instead of the question that was lost.
            scout.ask(here, &client, from, ifindex, to).await.unwrap();
            let answer = async {
                loop {
                    let Notice::Event(event) = events.next().await.unwrap() else { panic!("lost events") };
                    if let Some(path) = scout.answer(&event) {
                        return path;
                    }
                }
            };
            let answer = tokio::time::timeout(std::time::Duration::from_secs(30), answer).await;
            assert_eq!(answer.expect("an answer"), (from, to));
            let nobody =
                std::future::poll_fn(|cx| std::task::Poll::Ready(listener.poll_accept(cx).is_pending()));
            assert!(nobody.await, "the question came to a program");
        }
    }
}
