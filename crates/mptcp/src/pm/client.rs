//! Requests to the path manager of one network namespace.

use std::io;
use std::net::IpAddr;

use netlink_bindings::mptcp_pm::{OpGetAddrDo, OpGetLimitsDo, PushAddress, Request};
use netlink_bindings::traits::{NetlinkRequest, Pusher};
use nix::sys::socket::SockProtocol;

use super::{Address, Endpoint, EndpointFlags, Limits};
use crate::netlink::{Family, NLM_F_DUMP, Socket};
use crate::{AddrId, Error, Netns, Result, Token};

/// A connection to the path manager of one network namespace. Reading needs no privilege, changing needs
/// CAP_NET_ADMIN in the user namespace that owns it ([`Error::Capability`]).
///
/// Requests name what they were about in their errors, with the kernel's own words where it has some:
/// `add endpoint 10.0.0.2 id 2: File exists (kernel: …)`.
#[derive(Debug)]
pub struct Client {
    socket: Socket,
    family: Family,
}

impl Client {
    /// Connects to the path manager of `netns`. [`Error::Unsupported`] before Linux 5.7 and on kernels without
    /// MPTCP.
    pub async fn connect(netns: &Netns) -> Result<Self> {
        let (socket, family) =
            open(netns, &format!("connect to the path manager of network namespace {}", netns.name()))?;
        Ok(Client { socket, family })
    }

    /// All endpoints, in the kernel's order (`MPTCP_PM_CMD_GET_ADDR`).
    pub async fn endpoints(&self) -> Result<Vec<Endpoint>> {
        let what = "list endpoints";
        let request = Request::new().op_get_addr_dump();
        let answer = self.request(what, NLM_F_DUMP, &request, FIRST)?;
        answer.iter().map(|message| parse_endpoint(what, message)).collect()
    }

    /// The endpoint `id`. ENOENT or EINVAL ([`Error::Kernel`]) where there is none.
    pub async fn endpoint(&self, id: AddrId) -> Result<Endpoint> {
        let what = format!("get endpoint id {id}");
        let mut request = Request::new().op_get_addr_do();
        request.encode().nested_addr().push_id(id.0);
        let answer = self.request(&what, 0, &request, FIRST)?;
        parse_endpoint(&what, first(&what, &answer)?)
    }

    /// Adds an endpoint (`MPTCP_PM_CMD_ADD_ADDR`). EEXIST or EBUSY where its address or
    /// id is taken.
    ///
    /// Kernels ignore flags that they do not know; then the endpoint is taken back and the result is
    /// [`Error::Unsupported`].
    pub async fn add_endpoint(&self, endpoint: &Endpoint) -> Result<()> {
        let what = format!("add endpoint {endpoint}");
        let mut request = Request::new().op_add_addr_do();
        push_endpoint(request.encode().nested_addr(), endpoint);
        self.request(&what, 0, &request, FIRST)?;
        self.check_flags(what, endpoint).await
    }

    /// Deletes the endpoint `id` (`MPTCP_PM_CMD_DEL_ADDR`). Id 0 is the connections' own address and needs `ip`.
    pub async fn delete_endpoint(&self, id: AddrId, ip: Option<IpAddr>) -> Result<()> {
        let what = match ip {
            Some(ip) => format!("delete endpoint {ip} id {id}"),
            // The kernel would find nothing to do, in silence.
            None if id == AddrId(0) => return Err(invalid("delete endpoint id 0", "needs the address too")),
            None => format!("delete endpoint id {id}"),
        };
        let mut request = Request::new().op_del_addr_do();
        let mut address = request.encode().nested_addr().push_id(id.0);
        if let Some(ip) = ip {
            address = push_ip(address, ip);
        }
        drop(address);
        self.request(&what, 0, &request, FIRST).map(drop)
    }

    /// Sets backup and fullmesh of an endpoint, found by its id if it has one, else by its address
    /// (`MPTCP_PM_CMD_SET_FLAGS`, Linux 5.12 and newer). Subflows that use it change with it; the other flags
    /// of `endpoint` have no effect.
    pub async fn change_endpoint(&self, endpoint: &Endpoint) -> Result<()> {
        let mut request = Request::new().op_set_flags_do();
        let address = request.encode().nested_addr().push_flags(endpoint.flags.bits());
        drop(match endpoint.id {
            // With an address in the request the kernel would look for that and not for the id.
            Some(id) => address.push_id(id.0),
            None if endpoint.port != 0 => push_ip(address, endpoint.ip).push_port(endpoint.port),
            None => push_ip(address, endpoint.ip),
        });
        self.request(&format!("change endpoint {endpoint}"), 0, &request, SET_FLAGS).map(drop)
    }

    /// Deletes all endpoints (`MPTCP_PM_CMD_FLUSH_ADDRS`).
    pub async fn flush_endpoints(&self) -> Result<()> {
        self.request("flush endpoints", 0, &Request::new().op_flush_addrs_do(), FIRST).map(drop)
    }

    /// The limits (`MPTCP_PM_CMD_GET_LIMITS`).
    pub async fn limits(&self) -> Result<Limits> {
        let what = "get limits";
        let answer = self.request(what, 0, &Request::new().op_get_limits_do(), FIRST)?;
        let attributes = OpGetLimitsDo::decode_reply(first(what, &answer)?);
        Ok(Limits {
            add_addr_accepted: attributes.get_rcv_add_addrs().map_err(|e| malformed(what, e))?,
            subflows: attributes.get_subflows().map_err(|e| malformed(what, e))?,
        })
    }

    /// Sets both limits, 0 to 8 each (`MPTCP_PM_CMD_SET_LIMITS`).
    pub async fn set_limits(&self, limits: Limits) -> Result<()> {
        let mut request = Request::new().op_set_limits_do();
        request.encode().push_rcv_add_addrs(limits.add_addr_accepted).push_subflows(limits.subflows);
        let what =
            format!("set limits add_addr_accepted {} subflows {}", limits.add_addr_accepted, limits.subflows);
        self.request(&what, 0, &request, FIRST).map(drop)
    }

    /// Announces `local`, which needs an id above 0, to the peer of `token` (ADD_ADDR; userspace path manager,
    /// Linux 5.19 and newer).
    pub async fn announce(&self, token: Token, local: Address) -> Result<()> {
        let mut request = Request::new().op_announce_do();
        push_address(request.encode().push_token(token.0).nested_addr(), local, EndpointFlags::SIGNAL);
        self.request(&format!("announce {local} on {token}"), 0, &request, USERSPACE).map(drop)
    }

    /// Withdraws the address `id` from the peer of `token` (REMOVE_ADDR; userspace path manager, Linux 5.19 and
    /// newer).
    pub async fn remove(&self, token: Token, id: AddrId) -> Result<()> {
        let mut request = Request::new().op_remove_do();
        request.encode().push_token(token.0).push_loc_id(id.0);
        self.request(&format!("remove address id {id} on {token}"), 0, &request, USERSPACE).map(drop)
    }

    /// Opens a subflow (MP_JOIN; userspace path manager, Linux 5.19 and newer). `local` needs an id, one of its own
    /// unless it is the address of another subflow; of `flags` BACKUP has a meaning.
    ///
    /// Returns when the handshake has begun; [`super::EventKind::SubflowEstablished`] tells that it has ended well.
    pub async fn create_subflow(
        &self,
        token: Token,
        local: Address,
        remote: Address,
        flags: EndpointFlags,
    ) -> Result<()> {
        let what = format!("create subflow {local} to {remote} on {token}");
        if local.id.is_none() {
            // The kernel would take it for id 0, the address that the connection was opened on.
            return Err(invalid(what, "the local address needs an id"));
        }
        let mut request = Request::new().op_subflow_create_do();
        let address = push_address(request.encode().push_token(token.0).nested_addr(), local, flags);
        push_address(address.end_nested().nested_addr_remote(), remote, EndpointFlags::empty());
        self.request(&what, 0, &request, USERSPACE).map(drop)
    }

    /// Closes a subflow (userspace path manager, Linux 5.19 and newer). Needs addresses and ports of both ends,
    /// as events and [`crate::diag`] give them; ESRCH where there is no such subflow.
    pub async fn destroy_subflow(&self, token: Token, local: Address, remote: Address) -> Result<()> {
        let mut request = Request::new().op_subflow_destroy_do();
        let address =
            push_address(request.encode().push_token(token.0).nested_addr(), local, EndpointFlags::empty());
        push_address(address.end_nested().nested_addr_remote(), remote, EndpointFlags::empty());
        self.request(&format!("destroy subflow {local} to {remote} on {token}"), 0, &request, USERSPACE)
            .map(drop)
    }

    /// Sets or clears BACKUP of one subflow and tells the peer (MP_PRIO; userspace path manager, Linux 5.19 and
    /// newer).
    pub async fn set_backup(
        &self,
        token: Token,
        local: Address,
        remote: Address,
        backup: bool,
    ) -> Result<()> {
        let flags = if backup { EndpointFlags::BACKUP } else { EndpointFlags::empty() };
        let mut request = Request::new().op_set_flags_do();
        let address = push_address(request.encode().push_token(token.0).nested_addr(), local, flags);
        push_address(address.end_nested().nested_addr_remote(), remote, EndpointFlags::empty());
        let what = format!("set backup {backup} of subflow {local} to {remote} on {token}");
        self.request(&what, 0, &request, USERSPACE).map(drop)
    }

    /// Is the connection `token` one of the userspace path manager? That is settled when it begins. An error where
    /// there is no such connection; before Linux 6.10, which does not answer this question, the answer is yes.
    pub async fn is_userspace(&self, token: Token) -> Result<bool> {
        let what = format!("get the addresses of {token}");
        let mut request = Request::new().op_get_addr_dump();
        request.encode().push_token(token.0);
        match self.request(&what, NLM_F_DUMP, &request, USERSPACE) {
            Ok(_) => Ok(true),
            Err(error) if error.is_in_kernel_path_manager() => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn request(
        &self,
        what: &str,
        flags: u16,
        request: &impl NetlinkRequest,
        feature: Feature,
    ) -> Result<Vec<Vec<u8>>> {
        self.socket.request(what, self.family.id, flags, request.payload()).map_err(|error| match error {
            // A command that the kernel's family lacks is refused without words (genl_family_rcv_msg()).
            Error::Kernel { what, source, extack: None }
                if source.raw_os_error() == Some(libc::EOPNOTSUPP) =>
            {
                feature.unsupported(what)
            }
            error => error,
        })
    }

    async fn check_flags(&self, what: String, endpoint: &Endpoint) -> Result<()> {
        let Some((flag, feature)) = LATE_FLAGS.iter().find(|(flag, _)| endpoint.flags.contains(*flag)) else {
            return Ok(());
        };
        let added = self.endpoints().await?;
        let Some(added) = added.iter().find(|e| (e.ip, e.port) == (endpoint.ip, endpoint.port)) else {
            return Ok(()); // somebody deleted it meanwhile
        };
        if added.flags.contains(*flag) {
            return Ok(());
        }
        if let Some(id) = added.id {
            self.delete_endpoint(id, None).await?;
        }
        Err(feature.unsupported(what))
    }
}

/// What a kernel may be too old for.
#[derive(Clone, Copy)]
struct Feature {
    name: &'static str,
    since: &'static str,
}

const FIRST: Feature = Feature { name: "the MPTCP path manager", since: "5.7" };
const SET_FLAGS: Feature = Feature { name: "changing endpoints", since: "5.12" };
const USERSPACE: Feature = Feature { name: "the userspace path manager", since: "5.19" };
const LATE_FLAGS: [(EndpointFlags, Feature); 2] = [
    (EndpointFlags::LAMINAR, Feature { name: "laminar endpoints", since: "6.18" }),
    (EndpointFlags::FULLMESH, Feature { name: "fullmesh endpoints", since: "5.15" }),
];

impl Feature {
    fn unsupported(self, what: String) -> Error {
        Error::Unsupported { what, feature: self.name, since: self.since }
    }
}

/// The socket and the family's number.
pub(super) fn open(netns: &Netns, what: &str) -> Result<(Socket, Family)> {
    let socket = Socket::open(netns, SockProtocol::NetlinkGeneric)?;
    let family = socket.family(what, c"mptcp_pm").map_err(|error| match error.raw_os_error() {
        Some(libc::ENOENT) => FIRST.unsupported(what.to_string()),
        _ => error,
    })?;
    Ok((socket, family))
}

fn push_ip<P: Pusher>(address: PushAddress<P>, ip: IpAddr) -> PushAddress<P> {
    match ip {
        IpAddr::V4(ip) => address.push_family(libc::AF_INET as u16).push_addr4(ip.to_bits()),
        IpAddr::V6(ip) => address.push_family(libc::AF_INET6 as u16).push_addr6(&ip.octets()),
    }
}

fn push_endpoint<P: Pusher>(address: PushAddress<P>, endpoint: &Endpoint) -> PushAddress<P> {
    let Endpoint { ip, id, flags, port, ifindex } = *endpoint;
    push_address(address, Address { ip, id, port, ifindex }, flags)
}

fn push_address<P: Pusher>(address: PushAddress<P>, local: Address, flags: EndpointFlags) -> PushAddress<P> {
    let mut address = push_ip(address, local.ip);
    if let Some(id) = local.id {
        address = address.push_id(id.0);
    }
    if local.port != 0 {
        address = address.push_port(local.port);
    }
    if !flags.is_empty() {
        address = address.push_flags(flags.bits());
    }
    if local.ifindex != 0 {
        address = address.push_if_idx(local.ifindex as i32);
    }
    address
}

fn first<'a>(what: &str, answer: &'a [Vec<u8>]) -> Result<&'a [u8]> {
    answer.first().map(Vec::as_slice).ok_or_else(|| malformed(what, "no answer"))
}

fn parse_endpoint(what: &str, message: &[u8]) -> Result<Endpoint> {
    let attributes = OpGetAddrDo::decode_reply(message).get_addr().map_err(|e| malformed(what, e))?;
    let ip = match (attributes.get_addr4(), attributes.get_addr6()) {
        (Ok(ip), _) => IpAddr::from(ip.to_be_bytes()),
        (_, Ok(ip)) => IpAddr::from(
            <[u8; 16]>::try_from(ip).map_err(|_| malformed(what, "an IPv6 address of another length"))?,
        ),
        _ => return Err(malformed(what, "an endpoint without address")),
    };
    Ok(Endpoint {
        ip,
        id: attributes.get_id().ok().map(AddrId),
        flags: EndpointFlags::from_bits_retain(attributes.get_flags().unwrap_or(0)),
        port: attributes.get_port().unwrap_or(0),
        ifindex: attributes.get_if_idx().unwrap_or(0) as u32,
    })
}

fn invalid(what: impl Into<String>, why: &str) -> Error {
    Error::io(what, io::Error::new(io::ErrorKind::InvalidInput, why))
}

fn malformed(what: &str, detail: impl ToString) -> Error {
    Error::Malformed { what: what.into(), detail: detail.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_answer_makes_the_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            let _ = parse_endpoint("x", &bytes);
            let _ = OpGetLimitsDo::decode_reply(&bytes).get_subflows();
        }

        #[test]
        fn an_endpoint_reads_what_it_writes(
            ip: IpAddr, id in proptest::option::of(any::<u8>()), flags in 0u32..64, port: u16, ifindex in 0u32..1000,
        ) {
            let flags = EndpointFlags::from_bits_retain(flags);
            let endpoint = Endpoint { ip, id: id.map(AddrId), flags, port, ifindex };
            let mut request = Request::new().op_add_addr_do();
            push_endpoint(request.encode().nested_addr(), &endpoint);
            prop_assert_eq!(parse_endpoint("x", request.payload()).unwrap(), endpoint);
        }
    }
}
