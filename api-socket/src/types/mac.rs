//! An Ethernet address as text: six bytes in hexadecimal with colons between them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// An Ethernet address. Written in lower case, read in any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct MacAddress(pub [u8; 6]);

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<MacAddress, String> {
        let byte = |part: &str| match part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            true => u8::from_str_radix(part, 16).ok(),
            false => None,
        };
        let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
        bytes.and_then(|bytes| bytes.try_into().ok()).map(MacAddress).ok_or_else(|| {
            format!("invalid value: string {text:?}, expected a MAC address such as `06:00:ac:10:00:02`")
        })
    }
}

impl Serialize for MacAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<MacAddress, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_six_bytes_in_hexadecimal() {
        let address = MacAddress([0x06, 0, 0xac, 0x10, 0, 0xff]);
        assert_eq!("06:00:AC:10:00:fF".parse(), Ok(address));
        assert_eq!(address.to_string(), "06:00:ac:10:00:ff");
        for wrong in [
            "",
            "06:00:ac:10:00",
            "06:00:ac:10:00:02:03",
            "6:00:ac:10:00:02",
            "06-00-ac-10-00-02",
            "0g:00:ac:10:00:02",
            "+6:00:ac:10:00:02",
            "06:00:ac:10:00:02 ",
        ] {
            let error = wrong.parse::<MacAddress>().expect_err(wrong);
            assert!(error.contains(wrong) && error.contains("MAC address"), "{error}");
        }
    }
}
