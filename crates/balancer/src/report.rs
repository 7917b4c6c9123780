//! A backend's connections, told over TCP by its agent to a balancer that has lost its tables.
//!
//! ```text
//! agent    -> balancer   GREETING  A
//! balancer -> agent      B  most  addresses   HMAC(secret, "ask" A B agent's-address most addresses)
//! agent    -> balancer   flows                HMAC(secret, "tell" A B flows)
//! ```
//!
//! A and B are fresh random bytes, so that no message can be used twice; the agent's address is in it, so that no
//! answer can be passed off as another backend's. Nothing is encrypted: the packets themselves show addresses and tokens,
//! and a token alone joins nothing (RFC 8684 section 3.2 asks for the keys).

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use mptcp::{Netns, Token, diag};
use sha2::Sha256;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::abi::Address;
use crate::{Error, Result};

const GREETING: &[u8; 11] = b"braid-lb 1\n";
/// Most time to connect and be greeted, and for each side's question or answer.
const GREETED: Duration = Duration::from_secs(2);
const ANSWERED: Duration = Duration::from_secs(10);
/// Balancers that an agent talks to at the same time.
const BALANCERS: usize = 16;
/// Most addresses of a question.
const ADDRESSES: usize = 1024;

type Nonce = [u8; 32];

/// What balancers and agents share, from a file.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Vec<u8>);

impl Secret {
    /// The text of `path` without white space at its ends: 16 to 1024 bytes, in a file that not everybody may read.
    pub fn load(path: &Path) -> Result<Self> {
        let place = || path.display().to_string();
        let failed = |error: io::Error| Error::io(format!("read {}", place()), error);
        let wrong = |message: String| Error::from(configfile::Error::new(place(), message));
        let file = File::open(path).map_err(failed)?;
        if file.metadata().map_err(failed)?.permissions().mode() & 0o007 != 0 {
            return Err(wrong("everybody may use the secret (chmod o= takes that away)".into()));
        }
        let mut bytes = Vec::new();
        file.take(2048).read_to_end(&mut bytes).map_err(failed)?;
        let secret = bytes.trim_ascii();
        match secret.len() {
            16..=1024 => Ok(Secret(secret.into())),
            length => Err(wrong(format!("the secret has {length} bytes, not 16 to 1024"))),
        }
    }

    fn sign(&self, what: &[u8], a: &Nonce, b: &Nonce, message: &[&[u8]]) -> Hmac<Sha256> {
        let mut mac = Hmac::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        for part in [what, a, b].into_iter().chain(message.iter().copied()) {
            mac.update(part);
        }
        mac
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// A flow that a backend has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    /// The client's end.
    pub client: SocketAddr,
    /// The service's.
    pub service: SocketAddr,
    /// Of the MPTCP connection that it belongs to.
    pub token: Option<Token>,
}

/// Address and port.
const END: usize = 18;
/// Two ends and a token, 0 for none.
const FLOW: usize = 2 * END + 4;

/// What a balancer asks an agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Where the agent is.
    pub agent: SocketAddr,
    /// Which of the service's addresses and ports.
    pub addresses: Vec<SocketAddr>,
    /// Most flows that are of use.
    pub most: u32,
    /// What the agent must know, too.
    pub secret: Secret,
}

impl Question {
    /// Asks. The answer is the backend's as sure as the secret is one, and of the addresses asked about alone.
    pub async fn ask(&self) -> Result<Vec<Flow>> {
        let wrong = |message: String| Error::Agent { agent: self.agent, message };
        let failed = |error: io::Error| wrong(error.to_string());
        let late = |limit: Duration| wrong(format!("no answer in {limit:?}"));
        let greeted = timeout(GREETED, async {
            let mut stream = TcpStream::connect(self.agent).await?;
            let mut greeting = [0; GREETING.len()];
            let mut a: Nonce = [0; 32];
            stream.read_exact(&mut greeting).await?;
            stream.read_exact(&mut a).await?;
            io::Result::Ok((stream, greeting, a))
        });
        let (mut stream, greeting, a) = greeted.await.map_err(|_elapsed| late(GREETED))?.map_err(failed)?;
        if greeting != *GREETING {
            return Err(wrong("is no agent of braid lb, or one of another version".into()));
        }
        let asked = timeout(ANSWERED, async {
            let b = nonce().map_err(failed)?;
            let question = self.encode();
            let mac =
                self.secret.sign(b"ask", &a, &b, &[&end(self.agent), &question]).finalize().into_bytes();
            stream.write_all(&[&b[..], &question, &mac].concat()).await.map_err(failed)?;
            let count = stream.read_u32().await.map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => wrong(
                    "refuses the question: it has another secret, or it is reached by a translated address"
                        .into(),
                ),
                _ => failed(error),
            })?;
            if count > self.most {
                return Err(wrong(format!("wants to tell {count} flows, was asked for {}", self.most)));
            }
            let mut answer = vec![0; count as usize * FLOW];
            let mut mac = [0; 32];
            stream.read_exact(&mut answer).await.map_err(failed)?;
            stream.read_exact(&mut mac).await.map_err(failed)?;
            let expected = self.secret.sign(b"tell", &a, &b, &[&count.to_be_bytes(), &answer]);
            expected
                .verify_slice(&mac)
                .map_err(|_| wrong("its answer is not signed with our secret".into()))?;
            Ok(answer)
        });
        let answer = asked.await.map_err(|_elapsed| late(ANSWERED))??;
        let flows: Vec<Flow> = answer.as_chunks().0.iter().map(decode).collect();
        match flows.iter().find(|flow| !self.addresses.contains(&flow.service)) {
            Some(flow) => Err(wrong(format!("tells of {}, which it was not asked about", flow.service))),
            None => Ok(flows),
        }
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = self.most.to_be_bytes().to_vec();
        bytes.extend((self.addresses.len() as u16).to_be_bytes());
        self.addresses.iter().for_each(|address| bytes.extend(end(*address)));
        bytes
    }
}

/// An agent's part: tells the connections of `netns` to whoever comes to `listener` and knows the secret.
pub async fn serve(listener: TcpListener, secret: Secret, netns: Netns) {
    let secret = Arc::new(secret);
    let room = Arc::new(Semaphore::new(BALANCERS));
    loop {
        let place = Arc::clone(&room).acquire_owned().await.expect("nobody closes it");
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "no balancer accepted");
                // Out of descriptors, as a rule: until others have ended.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (secret, netns) = (Arc::clone(&secret), netns.clone());
        tokio::spawn(async move {
            match tell(stream, &secret, &netns).await {
                Ok(flows) => tracing::info!(balancer = %from, flows, "told"),
                Err(reason) => tracing::warn!(balancer = %from, reason, "told nothing"),
            }
            drop(place);
        });
    }
}

/// Tells a balancer what it asks for; how many flows, or why not.
async fn tell(mut stream: TcpStream, secret: &Secret, netns: &Netns) -> Result<usize, String> {
    let failed = |error: io::Error| error.to_string();
    let own = end(stream.local_addr().map_err(failed)?);
    let a = nonce().map_err(failed)?;
    let asked = timeout(GREETED, async {
        stream.write_all(&[&GREETING[..], &a].concat()).await?;
        let (mut b, mut head, mut mac) = ([0; 32], [0; 6], [0; 32]);
        stream.read_exact(&mut b).await?;
        stream.read_exact(&mut head).await?;
        let count = usize::from(u16::from_be_bytes([head[4], head[5]]));
        if count > ADDRESSES {
            return Err(io::Error::other(format!("asks about {count} addresses")));
        }
        let mut addresses = vec![0; count * END];
        stream.read_exact(&mut addresses).await?;
        stream.read_exact(&mut mac).await?;
        io::Result::Ok((b, head, addresses, mac))
    });
    let (b, head, addresses, mac) =
        asked.await.map_err(|_elapsed| format!("no question in {GREETED:?}"))?.map_err(failed)?;
    let signed = secret.sign(b"ask", &a, &b, &[&own, &head, &addresses]).verify_slice(&mac);
    signed.map_err(|_| "has another secret, or reached us by a translated address".to_string())?;

    let asked_for: HashSet<SocketAddr> = addresses.as_chunks().0.iter().map(read_end).collect();
    let most = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
    let mut flows = connections(netns, &asked_for).await.map_err(|error| error.to_string())?;
    flows.truncate(most as usize);
    let mut answer = (flows.len() as u32).to_be_bytes().to_vec();
    flows.iter().for_each(|flow| answer.extend(encode(flow)));
    let mac = secret.sign(b"tell", &a, &b, &[&answer]).finalize().into_bytes();
    answer.extend(mac);
    let told = timeout(ANSWERED, stream.write_all(&answer)).await;
    told.map_err(|_elapsed| format!("does not listen for {ANSWERED:?}"))?.map_err(failed)?;
    Ok(flows.len())
}

/// The flows of `netns` to one of `addresses`, MPTCP and TCP.
async fn connections(netns: &Netns, addresses: &HashSet<SocketAddr>) -> mptcp::Result<Vec<Flow>> {
    let mut flows = Vec::new();
    for connection in diag::connections_without_owners(netns).await? {
        // The connection's own pair of addresses is that of its first subflow, which may have ended.
        let subflows = connection.subflows.iter().map(|subflow| (subflow.remote, subflow.local));
        for (client, service) in [(connection.remote, connection.local)].into_iter().chain(subflows) {
            let token = (connection.token != Token(0)).then_some(connection.token);
            let flow = Flow { client: canonical(client), service: canonical(service), token };
            if addresses.contains(&flow.service) {
                flows.push(flow);
            }
        }
    }
    for (local, remote) in diag::plain_connections(netns).await? {
        let flow = Flow { client: canonical(remote), service: canonical(local), token: None };
        if addresses.contains(&flow.service) {
            flows.push(flow);
        }
    }
    let mut seen = HashSet::new();
    flows.retain(|flow| seen.insert(*flow));
    Ok(flows)
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn nonce() -> io::Result<Nonce> {
    let mut nonce = [0; 32];
    getrandom::fill(&mut nonce)?;
    Ok(nonce)
}

fn end(address: SocketAddr) -> [u8; END] {
    let mut bytes = [0; END];
    bytes[..16].copy_from_slice(&Address::from(address.ip()).0);
    bytes[16..].copy_from_slice(&address.port().to_be_bytes());
    bytes
}

fn read_end(bytes: &[u8; END]) -> SocketAddr {
    let [address @ .., high, low] = *bytes;
    SocketAddr::new(IpAddr::from(Address(address)), u16::from_be_bytes([high, low]))
}

fn encode(flow: &Flow) -> [u8; FLOW] {
    let mut bytes = [0; FLOW];
    bytes[..END].copy_from_slice(&end(flow.client));
    bytes[END..2 * END].copy_from_slice(&end(flow.service));
    bytes[2 * END..].copy_from_slice(&flow.token.unwrap_or_default().0.to_be_bytes());
    bytes
}

fn decode(bytes: &[u8; FLOW]) -> Flow {
    let (ends, token) = bytes.as_chunks::<END>();
    let token = u32::from_be_bytes(token.try_into().expect("four bytes are left"));
    Flow {
        client: read_end(&ends[0]),
        service: read_end(&ends[1]),
        token: (token != 0).then_some(Token(token)),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;

    use mptcp::info::Status;
    use mptcp::socket::{self, Options};
    use proptest::prelude::*;
    use tokio::io::copy_bidirectional;

    use super::*;

    fn secret(text: &str) -> Secret {
        Secret(text.as_bytes().into())
    }

    fn right() -> Secret {
        secret("a secret of enough bytes")
    }

    async fn listener(addr: &str) -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind(addr).await.unwrap();
        let addr = listener.local_addr().unwrap();
        (listener, addr)
    }

    async fn agent(secret: Secret) -> SocketAddr {
        let (listener, addr) = listener("127.0.0.1:0").await;
        tokio::spawn(serve(listener, secret, Netns::current().unwrap()));
        addr
    }

    fn question(agent: SocketAddr, addresses: &[SocketAddr]) -> Question {
        Question { agent, addresses: addresses.into(), most: 100, secret: right() }
    }

    async fn refused(question: Question) -> String {
        let error = question.ask().await.unwrap_err().to_string();
        error.strip_prefix(&format!("agent {}: ", question.agent)).unwrap().to_string()
    }

    /// A connection to `listener`, both ends.
    async fn connected(listener: &TcpListener, options: &Options) -> (TcpStream, TcpStream) {
        let to = listener.local_addr().unwrap().to_string();
        let (dialled, accepted) = tokio::join!(socket::dial(&to, options), listener.accept());
        (dialled.unwrap(), accepted.unwrap().0)
    }

    #[tokio::test]
    async fn an_agent_tells_the_connections_that_were_asked_about_with_their_tokens() {
        let mptcp = socket::listen("127.0.0.1:0".parse().unwrap(), &Options::default()).unwrap();
        let (plain, plain_addr) = listener("127.0.0.1:0").await;
        let (other, _) = listener("127.0.0.1:0").await;
        let tcp = Options { protocol: socket::Protocol::Tcp, ..Options::default() };
        let mptcp_ends = connected(&mptcp, &Options::default()).await;
        let plain_ends = connected(&plain, &tcp).await;
        let _other_ends = connected(&other, &tcp).await;

        let mptcp_addr = mptcp.local_addr().unwrap();
        let flow = |ends: &(TcpStream, TcpStream), service| Flow {
            client: ends.0.local_addr().unwrap(),
            service,
            token: match mptcp::info::of(&ends.1).unwrap() {
                Status::Mptcp(info) => info.token,
                _ => None,
            },
        };
        let expected = [flow(&mptcp_ends, mptcp_addr), flow(&plain_ends, plain_addr)];
        assert!(expected[0].token.is_some() && expected[1].token.is_none(), "{expected:?}");
        let question = question(agent(right()).await, &[mptcp_addr, plain_addr]);
        assert_eq!(question.ask().await.unwrap(), expected);
        let fewer = Question { most: 1, ..question };
        assert_eq!(fewer.ask().await.unwrap(), expected[..1]);
    }

    #[tokio::test]
    async fn who_has_another_secret_is_told_nothing() {
        let asked = refused(question(agent(secret("another secret of 24 bytes")).await, &[])).await;
        assert_eq!(
            asked,
            "refuses the question: it has another secret, or it is reached by a translated address"
        );
    }

    /// The answer of another backend must not pass for this one's.
    #[tokio::test]
    async fn an_agent_that_is_reached_by_another_address_refuses() {
        let agent = agent(right()).await;
        let (listener, addr) = listener("127.0.0.1:0").await;
        tokio::spawn(async move {
            let mut from = listener.accept().await.unwrap().0;
            let mut to = TcpStream::connect(agent).await.unwrap();
            copy_bidirectional(&mut from, &mut to).await
        });
        assert!(refused(question(addr, &[])).await.starts_with("refuses the question"));
        assert_eq!(question(agent, &[]).ask().await.unwrap(), []);
    }

    /// Asks an agent that greets well and then answers as `answer` says, given the two nonces.
    async fn liar(answer: impl FnOnce(&Nonce, &Nonce) -> Vec<u8> + Send + 'static) -> String {
        let (listener, addr) = listener("127.0.0.1:0").await;
        tokio::spawn(async move {
            let mut stream = listener.accept().await.unwrap().0;
            stream.write_all(&[&GREETING[..], &[7; 32]].concat()).await.unwrap();
            let mut b = [0; 32];
            stream.read_exact(&mut b).await.unwrap();
            let mut rest = [0; 6 + 32];
            stream.read_exact(&mut rest).await.unwrap();
            stream.write_all(&answer(&[7; 32], &b)).await.unwrap();
        });
        refused(question(addr, &[])).await
    }

    fn signed(secret: &Secret, a: &Nonce, b: &Nonce, answer: Vec<u8>) -> Vec<u8> {
        let mac = secret.sign(b"tell", a, b, &[&answer]).finalize().into_bytes();
        [answer, mac.to_vec()].concat()
    }

    #[tokio::test]
    async fn an_answer_that_is_not_signed_or_goes_beyond_the_question_is_refused() {
        let none = 0u32.to_be_bytes().to_vec();
        let empty = none.clone();
        let said = liar(move |a, b| signed(&secret("some other secret"), a, b, empty)).await;
        assert_eq!(said, "its answer is not signed with our secret");
        // Of another dialogue.
        let empty = none.clone();
        let said = liar(move |a, _| signed(&right(), a, &[0; 32], empty)).await;
        assert_eq!(said, "its answer is not signed with our secret");
        let said = liar(move |_, _| 101u32.to_be_bytes().to_vec()).await;
        assert_eq!(said, "wants to tell 101 flows, was asked for 100");
        let end = "10.0.0.1:22".parse().unwrap();
        let flow = encode(&Flow { client: end, service: end, token: None });
        let said = liar(move |a, b| signed(&right(), a, b, [&1u32.to_be_bytes()[..], &flow].concat())).await;
        assert_eq!(said, "tells of 10.0.0.1:22, which it was not asked about");
        let said = liar(move |_, _| none).await;
        assert!(said.contains("eof"), "{said}");
    }

    #[tokio::test]
    async fn who_is_no_agent_or_says_nothing_is_named() {
        let (silent, addr) = listener("127.0.0.1:0").await;
        assert_eq!(refused(question(addr, &[])).await, "no answer in 2s");
        drop(silent);
        let said = refused(question(addr, &[])).await;
        assert!(said.contains("refused"), "{said}");
        let (other, addr) = listener("127.0.0.1:0").await;
        tokio::spawn(async move {
            let mut stream = other.accept().await.unwrap().0;
            stream.write_all(&[b'x'; 100]).await.unwrap();
            stream.read_u8().await
        });
        let said = refused(question(addr, &[])).await;
        assert_eq!(said, "is no agent of braid lb, or one of another version");
    }

    #[test]
    fn a_secret_is_long_enough_and_not_everybodys() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("secret");
        let load = |text: &str, mode: u32| {
            std::fs::write(&file, text).unwrap();
            std::fs::set_permissions(&file, Permissions::from_mode(mode)).unwrap();
            Secret::load(&file).map_err(|e| e.to_string().replace(file.to_str().unwrap(), "FILE"))
        };
        assert_eq!(load(" 0123456789abcdef\n", 0o640), Ok(secret("0123456789abcdef")));
        assert_eq!(
            load("0123456789abcde\n", 0o600),
            Err("FILE: the secret has 15 bytes, not 16 to 1024".into())
        );
        assert!(load(&"x".repeat(3000), 0o600).is_err());
        let open = load("0123456789abcdef", 0o604);
        assert_eq!(open, Err("FILE: everybody may use the secret (chmod o= takes that away)".into()));
        std::fs::remove_file(&file).unwrap();
        assert!(Secret::load(&file).unwrap_err().to_string().starts_with("read "));
    }

    proptest! {
        #[test]
        fn a_flow_is_read_as_it_was_written(client: (u128, u16), service: (u32, u16), token: u32) {
            let flow = Flow {
                client: canonical(SocketAddr::new(std::net::Ipv6Addr::from(client.0).into(), client.1)),
                service: SocketAddr::new(std::net::Ipv4Addr::from(service.0).into(), service.1),
                token: (token != 0).then_some(Token(token)),
            };
            prop_assert_eq!(decode(&encode(&flow)), flow);
        }

        #[test]
        fn no_question_makes_an_agent_panic_or_tell(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let (listener, addr) = listener("127.0.0.1:0").await;
                let mut stream = TcpStream::connect(addr).await.unwrap();
                stream.write_all(&bytes).await.unwrap();
                stream.shutdown().await.unwrap();
                let told = tell(listener.accept().await.unwrap().0, &right(), &Netns::current().unwrap()).await;
                assert!(told.is_err());
            });
        }
    }
}
