//! The HTTP endpoint that Prometheus scrapes, for every daemon of Braid.

use std::fmt::Display;
use std::io;
use std::net::SocketAddr;

use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// The endpoint; dropping it closes the socket.
#[derive(Debug)]
pub struct Endpoint {
    /// The address that was asked for.
    pub asked: SocketAddr,
    task: JoinHandle<()>,
}

impl Endpoint {
    /// Serves what `scrape` returns, text in the OpenMetrics format, at `http://ADDR/metrics`. Its error becomes the
    /// answer, with status 500.
    ///
    /// # Errors
    /// Those of `bind(2)` and `listen(2)`.
    pub async fn serve<E: Display>(
        addr: SocketAddr,
        scrape: impl Fn() -> Result<String, E> + Clone + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(addr).await?;
        tracing::info!(addr = %listener.local_addr()?, "serving metrics");
        let get = axum::routing::get(async move || match scrape() {
            Ok(text) => {
                let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
                (StatusCode::OK, [(CONTENT_TYPE, kind)], text)
            }
            Err(error) => {
                (StatusCode::INTERNAL_SERVER_ERROR, [(CONTENT_TYPE, "text/plain")], error.to_string())
            }
        });
        let app = axum::Router::new().route("/metrics", get);
        let task = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, app).await {
                tracing::error!(%error, "metrics endpoint ended");
            }
        });
        Ok(Endpoint { asked: addr, task })
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.task.abort();
    }
}
