//! How often each endpoint was used, for the metrics. Only the API thread writes; anyone reads.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::routes::{ENDPOINTS, Endpoint, Method};

const METHODS: usize = 4;

/// Counts since the start of the server.
#[derive(Debug, Default)]
pub struct Counters {
    /// Requests that used something deprecated.
    pub deprecated: AtomicU64,
    /// Requests that were no HTTP, or went to no endpoint.
    pub unknown: AtomicU64,
    /// Connections refused because there were too many.
    pub refused_connections: AtomicU64,
    endpoints: [[Count; METHODS]; ENDPOINTS.len()],
}

/// The requests to one endpoint by one method.
#[derive(Debug, Default)]
pub struct Count {
    /// All of them.
    pub requests: AtomicU64,
    /// Those answered with a fault.
    pub faults: AtomicU64,
}

impl Counters {
    /// The counts of an endpoint. One for a method that the endpoint does not have stays 0.
    pub fn of(&self, method: Method, endpoint: Endpoint) -> &Count {
        // Both enums have as many variants as the table has rows and columns; a test counts them.
        &self.endpoints[endpoint as usize][method as usize]
    }
}

/// Adds one.
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_endpoint_and_method_has_its_count() {
        let counters = Counters::default();
        for (row, (endpoint, _, _)) in ENDPOINTS.iter().enumerate() {
            assert_eq!(*endpoint as usize, row, "the table of endpoints has the order of the enum");
            for method in [Method::Get, Method::Put, Method::Patch, Method::Delete] {
                count(&counters.of(method, *endpoint).requests);
                assert_eq!(counters.of(method, *endpoint).requests.load(Ordering::Relaxed), 1);
            }
        }
    }
}
