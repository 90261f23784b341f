//! Session tokens: a time at which each ends, and a code by which it is known to be ours (HMAC-SHA256). None is kept, so a
//! guest may ask for as many as it likes.
//!
//! The key is drawn at the start and never leaves the process: a token is of no use to another guest, nor to this one after
//! a restore. Time is the host's monotonic clock, so that nobody makes a token live longer by setting a clock.

use std::io;
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use devices::random;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// How long a token may live, in seconds.
pub const TTL_SECONDS: RangeInclusive<u32> = 1..=21600;

/// The time and the code.
const TIME_BYTES: usize = 8;
const TOKEN_BYTES: usize = TIME_BYTES + 32;

/// Makes tokens, and knows its own.
pub struct Tokens {
    mac: Hmac<Sha256>,
    start: Instant,
}

impl Tokens {
    /// With a new key.
    ///
    /// # Errors
    /// That of asking the kernel for random bytes.
    pub fn new() -> io::Result<Tokens> {
        let mut key = [0; 32];
        random::fill(&mut key)?;
        let mac = Hmac::new_from_slice(&key).map_err(io::Error::other)?;
        Ok(Tokens { mac, start: Instant::now() })
    }

    /// A token that is valid for so many seconds, within [`TTL_SECONDS`].
    pub fn issue(&self, now: Instant, ttl_seconds: u32) -> String {
        let end = self.milliseconds(now + Duration::from_secs(ttl_seconds.into())).to_be_bytes();
        let code = self.mac.clone().chain_update(end).finalize().into_bytes();
        end.iter().chain(code.iter()).map(|byte| format!("{byte:02x}")).collect()
    }

    /// Whether this is one of ours that has not ended.
    pub fn is_valid(&self, now: Instant, token: &str) -> bool {
        let Some((end, code)) = parse(token).and_then(|bytes| {
            let (end, code) = bytes.split_first_chunk::<TIME_BYTES>()?;
            Some((*end, code.to_vec()))
        }) else {
            return false;
        };
        // Compared in a time that does not tell how much of it is right.
        let is_ours = self.mac.clone().chain_update(end).verify_slice(&code).is_ok();
        is_ours && self.milliseconds(now) < u64::from_be_bytes(end)
    }

    fn milliseconds(&self, then: Instant) -> u64 {
        u64::try_from(then.saturating_duration_since(self.start).as_millis()).unwrap_or(u64::MAX)
    }
}

fn parse(token: &str) -> Option<Vec<u8>> {
    let digits = token.as_bytes();
    if digits.len() != 2 * TOKEN_BYTES {
        return None;
    }
    let value = |digit: &u8| char::from(*digit).to_digit(16);
    let byte = |pair: &[u8]| Some((value(pair.first()?)? << 4 | value(pair.get(1)?)?) as u8);
    digits.chunks(2).map(byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_valid_until_its_time_has_come() {
        let (tokens, now) = (Tokens::new().unwrap(), Instant::now());
        for ttl in [*TTL_SECONDS.start(), 60, *TTL_SECONDS.end()] {
            let token = tokens.issue(now, ttl);
            let after = |ms| tokens.is_valid(now + Duration::from_millis(ms), &token);
            assert!(after(0) && after(u64::from(ttl) * 1000 - 2), "{ttl}");
            assert!(!after(u64::from(ttl) * 1000 + 1), "{ttl}");
        }
    }

    #[test]
    fn what_is_not_ours_is_not_valid() {
        let (tokens, now) = (Tokens::new().unwrap(), Instant::now());
        let token = tokens.issue(now, 60);
        assert!(tokens.is_valid(now, &token));
        assert!(!Tokens::new().unwrap().is_valid(now, &token), "another key");
        for place in 0..token.len() {
            let mut other = token.clone().into_bytes();
            other[place] = if other[place] == b'0' { b'1' } else { b'0' };
            assert!(!tokens.is_valid(now, &String::from_utf8(other).unwrap()), "digit {place}");
        }
        for other in
            ["", "0", &token[1..], &format!("{token}0"), &"é".repeat(TOKEN_BYTES), &"+1".repeat(TOKEN_BYTES)]
        {
            assert!(!tokens.is_valid(now, other), "{other}");
        }
    }
}
