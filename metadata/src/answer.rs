//! What each request gets: GET a part of the store, PUT /latest/api/token a token, everything else a refusal.
//!
//! Pure but for the store, the clock that is given and the counters.

use std::time::Instant;

use crate::http::{JSON, Request, Response, TEXT};
use crate::store::{Format, NoText};
use crate::token::TTL_SECONDS;
use crate::{Metadata, count};

/// Where tokens are asked for.
pub const TOKEN_PATH: &str = "/latest/api/token";

const TOKEN: [&str; 2] = ["x-metadata-token", "x-aws-ec2-metadata-token"];
const TTL: [&str; 2] = ["x-metadata-token-ttl-seconds", "x-aws-ec2-metadata-token-ttl-seconds"];
const FORWARDED: &str = "x-forwarded-for";

/// How the service answers, as it is configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    pub version: Version,
    /// Answers have the form of EC2's service whatever a request says that it accepts.
    pub imds_compat: bool,
}

/// Who is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// Everyone.
    V1,
    /// Those with a token.
    V2,
}

impl Metadata {
    /// Answers one request.
    pub fn answer(&self, rules: Rules, request: &Request, now: Instant) -> Response {
        count(&self.counters.rx_count, 1);
        match request.method.as_str() {
            "GET" => match self.check_token(rules.version, request, now) {
                Ok(()) => self.get(rules, request),
                Err(refusal) => refusal,
            },
            "PUT" => self.put(request, now),
            method => Response {
                headers: vec![("Allow", "GET, PUT".into())],
                ..Response::text(405, format!("{method} is not allowed here; there are GET and PUT."))
            },
        }
    }

    fn check_token(&self, version: Version, request: &Request, now: Instant) -> Result<(), Response> {
        let (counter, refusal) = match request.header(&TOKEN) {
            Some((_, token)) if self.tokens.is_valid(now, token) => return Ok(()),
            Some(_) => (&self.counters.rx_invalid_token, "MMDS token not valid."),
            None => (
                &self.counters.rx_no_token,
                "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header to specify the \
                 session token.",
            ),
        };
        count(counter, 1);
        match version {
            Version::V1 => Ok(()),
            Version::V2 => Err(Response::text(401, refusal)),
        }
    }

    fn get(&self, rules: Rules, request: &Request) -> Response {
        let wants_json = request.header(&["accept"]).is_some_and(|(_, accept)| prefers_json(accept));
        let (format, content_type) = match wants_json && !rules.imds_compat {
            true => (Format::Json, JSON),
            false => (Format::Imds, TEXT),
        };
        match self.store().text(&request.path, format) {
            Ok(body) => Response { content_type, ..Response::text(200, body) },
            Err(NoText::NotFound) => not_found(request),
            Err(NoText::NoForm) => Response::text(
                501,
                "Cannot retrieve value. It is neither a string nor an object; ask for it with Accept: application/json.",
            ),
        }
    }

    fn put(&self, request: &Request, now: Instant) -> Response {
        // A proxy that was led astray says so here, and its caller is not the guest's own program.
        if request.header(&[FORWARDED]).is_some() {
            return Response::text(400, "X-Forwarded-For is not allowed in a request for a token.");
        }
        if !request.path.split('/').filter(|part| !part.is_empty()).eq(["latest", "api", "token"]) {
            return not_found(request);
        }
        let Some((name, value)) = request.header(&TTL) else {
            return Response::text(
                400,
                "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or \
                 `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime.",
            );
        };
        match value.parse::<u32>() {
            Ok(ttl) if TTL_SECONDS.contains(&ttl) => Response {
                headers: vec![(name, ttl.to_string())],
                ..Response::text(200, self.tokens.issue(now, ttl))
            },
            _ => Response::text(
                400,
                format!(
                    "The token's time to live is not a number of seconds from {} to {}.",
                    TTL_SECONDS.start(),
                    TTL_SECONDS.end()
                ),
            ),
        }
    }
}

fn not_found(request: &Request) -> Response {
    Response::text(404, format!("Resource not found: {}.", request.path))
}

/// Whether JSON comes before text in an Accept header.
fn prefers_json(accept: &str) -> bool {
    let types = accept.split(',').map(|range| range.split(';').next().unwrap_or_default().trim());
    types.into_iter().find_map(|name| match name.to_ascii_lowercase().as_str() {
        JSON => Some(true),
        TEXT => Some(false),
        _ => None,
    }) == Some(true)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;
    use std::time::Duration;

    use super::*;
    use crate::http;

    const V1: Rules = Rules { version: Version::V1, imds_compat: false };
    const V2: Rules = Rules { version: Version::V2, imds_compat: false };

    fn metadata() -> Metadata {
        let metadata = Metadata::new(1000).unwrap();
        let value = serde_json::json!({"latest": {"id": "i-1", "age": 4}});
        metadata.store().put(value.as_object().unwrap().clone()).unwrap();
        metadata
    }

    fn ask(metadata: &Metadata, rules: Rules, line: &str, headers: &[&str]) -> Response {
        ask_at(metadata, rules, line, headers, Instant::now())
    }

    fn ask_at(metadata: &Metadata, rules: Rules, line: &str, headers: &[&str], now: Instant) -> Response {
        let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
        let text = format!("{line} HTTP/1.1\r\n{headers}\r\n");
        let (request, _) = http::parse(text.as_bytes()).unwrap().unwrap();
        metadata.answer(rules, &request, now)
    }

    fn body(response: Response) -> (u16, String) {
        (response.status, response.body)
    }

    #[test]
    fn version_1_answers_everyone_and_version_2_those_with_a_token() {
        let metadata = metadata();
        let get = |rules, headers: &[&str]| ask(&metadata, rules, "GET /latest/id", headers).status;
        assert_eq!([get(V1, &[]), get(V1, &["X-metadata-token: x"])], [200, 200]);
        assert_eq!([get(V2, &[]), get(V2, &["X-metadata-token: x"])], [401, 401]);
        let counters = metadata.counters();
        assert_eq!(counters.rx_no_token.load(Ordering::Relaxed), 2);
        assert_eq!(counters.rx_invalid_token.load(Ordering::Relaxed), 2);
        for (ttl, token) in TTL.iter().zip(TOKEN) {
            for rules in [V1, V2] {
                let answer = ask(&metadata, rules, &format!("PUT {TOKEN_PATH}"), &[&format!("{ttl}: 60")]);
                assert_eq!((answer.status, answer.headers), (200, vec![(*ttl, "60".to_string())]));
                assert_eq!(get(V2, &[&format!("{token}: {}", answer.body)]), 200);
            }
        }
        assert_eq!(counters.rx_invalid_token.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn a_token_ends() {
        let (metadata, now) = (metadata(), Instant::now());
        let token =
            ask_at(&metadata, V2, "PUT //latest/api/token/", &["X-metadata-token-ttl-seconds: 10"], now).body;
        let header = format!("X-metadata-token: {token}");
        let after = |seconds| {
            ask_at(&metadata, V2, "GET /latest/id", &[&header], now + Duration::from_secs(seconds)).status
        };
        assert_eq!([after(9), after(11)], [200, 401]);
    }

    #[test]
    fn what_is_no_request_for_a_token_is_refused() {
        let metadata = metadata();
        let put = |path: &str, headers: &[&str]| ask(&metadata, V2, &format!("PUT {path}"), headers).status;
        let ttl = "X-metadata-token-ttl-seconds: 60";
        assert_eq!(put(TOKEN_PATH, &[ttl, "x-forwarded-for: 10.0.0.1"]), 400);
        assert_eq!(put("/latest/api/tokens", &[ttl]), 404);
        assert_eq!(put(TOKEN_PATH, &[]), 400);
        for wrong in ["0", "21601", "-1", "x", "", "1.5", "99999999999"] {
            assert_eq!(put(TOKEN_PATH, &[&format!("X-metadata-token-ttl-seconds: {wrong}")]), 400, "{wrong}");
        }
        for ttl in ["1", "21600"] {
            assert_eq!(put(TOKEN_PATH, &[&format!("X-metadata-token-ttl-seconds: {ttl}")]), 200);
        }
    }

    #[test]
    fn other_methods_and_paths_are_refused() {
        let metadata = metadata();
        for method in ["POST", "PATCH", "DELETE", "HEAD", "get"] {
            let answer = ask(&metadata, V1, &format!("{method} /latest"), &[]);
            assert_eq!((answer.status, answer.headers), (405, vec![("Allow", "GET, PUT".to_string())]));
        }
        assert_eq!(ask(&metadata, V1, "GET /nothing", &[]).status, 404);
        assert_eq!(ask(&metadata, V1, "GET /latest/age", &[]).status, 501);
    }

    #[test]
    fn the_form_is_what_is_accepted_unless_compatibility_is_wanted() {
        let metadata = metadata();
        let json = (200, r#"{"age":4,"id":"i-1"}"#.to_string());
        let imds = (200, "age\nid".to_string());
        for (accept, expected) in [
            ("*/*", &imds),
            ("text/plain", &imds),
            ("text/plain, application/json", &imds),
            ("application/json", &json),
            ("Application/JSON; q=1, text/plain", &json),
            ("text/html,application/json", &json),
        ] {
            let accept = format!("Accept: {accept}");
            assert_eq!(&body(ask(&metadata, V1, "GET /latest", &[&accept])), expected, "{accept}");
            let compatible = Rules { imds_compat: true, ..V1 };
            assert_eq!(body(ask(&metadata, compatible, "GET /latest", &[&accept])), imds, "{accept}");
        }
        assert_eq!(body(ask(&metadata, V1, "GET /latest", &[])), imds);
        assert_eq!(ask(&metadata, V1, "GET /latest", &["Accept: application/json"]).content_type, JSON);
    }
}
