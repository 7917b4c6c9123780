//! Requests to the path manager of one network namespace.

use super::{Address, Endpoint, EndpointFlags, Limits};
use crate::{AddrId, Netns, Result, Token};

/// A connection to the path manager of one network namespace. Reading needs no privilege, changing needs
/// CAP_NET_ADMIN.
#[derive(Debug)]
pub struct Client {}

#[allow(unused_variables, clippy::unused_async)]
impl Client {
    /// Connects to the path manager of `netns`.
    pub async fn connect(netns: &Netns) -> Result<Self> {
        unimplemented!()
    }

    /// All endpoints, in the kernel's order.
    pub async fn endpoints(&self) -> Result<Vec<Endpoint>> {
        unimplemented!()
    }

    /// The endpoint `id`.
    pub async fn endpoint(&self, id: AddrId) -> Result<Endpoint> {
        unimplemented!()
    }

    /// Adds an endpoint.
    pub async fn add_endpoint(&self, endpoint: &Endpoint) -> Result<()> {
        unimplemented!()
    }

    /// Deletes the endpoint `id`. Id 0 is the connections' own address and needs `ip`.
    pub async fn delete_endpoint(&self, id: AddrId, ip: Option<std::net::IpAddr>) -> Result<()> {
        unimplemented!()
    }

    /// Sets backup and fullmesh of an endpoint, found by its id if it has one, else by its address.
    pub async fn change_endpoint(&self, endpoint: &Endpoint) -> Result<()> {
        unimplemented!()
    }

    /// Deletes all endpoints.
    pub async fn flush_endpoints(&self) -> Result<()> {
        unimplemented!()
    }

    /// The limits.
    pub async fn limits(&self) -> Result<Limits> {
        unimplemented!()
    }

    /// Sets both limits.
    pub async fn set_limits(&self, limits: Limits) -> Result<()> {
        unimplemented!()
    }

    /// Announces `local` to the peer of `token` (ADD_ADDR; userspace path manager).
    pub async fn announce(&self, token: Token, local: Address) -> Result<()> {
        unimplemented!()
    }

    /// Withdraws the address `id` from the peer of `token` (REMOVE_ADDR; userspace path manager).
    pub async fn remove(&self, token: Token, id: AddrId) -> Result<()> {
        unimplemented!()
    }

    /// Opens a subflow (MP_JOIN; userspace path manager).
    pub async fn create_subflow(&self, token: Token, local: Address, remote: Address, flags: EndpointFlags) -> Result<()> {
        unimplemented!()
    }

    /// Closes a subflow (userspace path manager).
    pub async fn destroy_subflow(&self, token: Token, local: Address, remote: Address) -> Result<()> {
        unimplemented!()
    }

    /// Sets or clears BACKUP of one subflow and tells the peer (MP_PRIO; userspace path manager).
    pub async fn set_backup(&self, token: Token, local: Address, remote: Address, backup: bool) -> Result<()> {
        unimplemented!()
    }
}
