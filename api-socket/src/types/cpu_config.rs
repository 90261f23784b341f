//! The body of `/cpu-config`: which CPUID bits and MSR values a guest sees, and which KVM capabilities are needed.
//!
//! Numbers are texts here, as in Firecracker's CPU templates. This module reads them; it does not apply them.

use std::fmt;
use std::path::PathBuf;

use serde::de::value::MapAccessDeserializer;
use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Body of `PUT /cpu-config`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    #[serde(default)]
    pub kvm_capabilities: Vec<KvmCapability>,
    #[serde(default)]
    pub cpuid_modifiers: Vec<CpuidLeafModifier>,
    #[serde(default)]
    pub msr_modifiers: Vec<MsrModifier>,
}

/// In a configuration file the `cpu-config` section is either the configuration or the path of a file with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum CpuConfigSource {
    Path(PathBuf),
    Inline(CpuConfig),
}

// By hand, because serde's untagged enums lose which field was wrong.
impl<'de> Deserialize<'de> for CpuConfigSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<CpuConfigSource, D::Error> {
        struct PathOrObject;

        impl<'de> Visitor<'de> for PathOrObject {
            type Value = CpuConfigSource;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("the path of a CPU configuration file or the configuration itself")
            }

            fn visit_str<E: de::Error>(self, path: &str) -> Result<CpuConfigSource, E> {
                Ok(CpuConfigSource::Path(PathBuf::from(path)))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<CpuConfigSource, A::Error> {
                CpuConfig::deserialize(MapAccessDeserializer::new(map)).map(CpuConfigSource::Inline)
            }
        }

        deserializer.deserialize_any(PathOrObject)
    }
}

/// A KVM capability number (`KVM_CAP_*`): `"121"` adds it to those the VMM insists on, `"!121"` takes it away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvmCapability {
    Add(u32),
    Remove(u32),
}

impl Serialize for KvmCapability {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            KvmCapability::Add(number) => serializer.collect_str(number),
            KvmCapability::Remove(number) => serializer.collect_str(&format_args!("!{number}")),
        }
    }
}

impl<'de> Deserialize<'de> for KvmCapability {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<KvmCapability, D::Error> {
        let text = String::deserialize(deserializer)?;
        let parsed = match text.strip_prefix('!') {
            Some(number) => number.parse().map(KvmCapability::Remove),
            None => text.parse().map(KvmCapability::Add),
        };
        parsed.map_err(|_| {
            de::Error::custom(format!(
                "`{text}` is not a KVM capability; give its number, with `!` before it to remove it"
            ))
        })
    }
}

/// Changes to one leaf and subleaf of CPUID.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidLeafModifier {
    #[serde(with = "number_text")]
    pub leaf: u32,
    #[serde(with = "number_text")]
    pub subleaf: u32,
    /// KVM's `KVM_CPUID_FLAG_*` of the leaf.
    pub flags: u32,
    pub modifiers: Vec<CpuidModifier>,
}

/// Changes to one register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidModifier {
    pub register: CpuidRegister,
    /// Of 32 bits.
    pub bitmap: Bitmap<u32>,
}

/// A register that CPUID fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CpuidRegister {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Changes to the initial value of one MSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsrModifier {
    #[serde(with = "number_text")]
    pub addr: u32,
    /// Of 64 bits.
    pub bitmap: Bitmap<u64>,
}

/// Some bits of a register, set or cleared: the text `0b` and then, most significant first, `1`, `0` or `x` (leave)
/// for each bit; bits in front that are not given are left. `_` may separate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bitmap<T> {
    /// 1 where the bit changes.
    pub filter: T,
    /// What it changes to; 0 where it does not.
    pub value: T,
}

impl Bitmap<u32> {
    /// `register` with this bitmap applied.
    pub fn apply(&self, register: u32) -> u32 {
        register & !self.filter | self.value
    }
}

impl Bitmap<u64> {
    /// `register` with this bitmap applied.
    pub fn apply(&self, register: u64) -> u64 {
        register & !self.filter | self.value
    }
}

impl Serialize for Bitmap<u32> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&bitmap_text(self.filter.into(), self.value.into(), u32::BITS))
    }
}

impl Serialize for Bitmap<u64> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&bitmap_text(self.filter, self.value, u64::BITS))
    }
}

impl<'de> Deserialize<'de> for Bitmap<u32> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Bitmap<u32>, D::Error> {
        let (filter, value) = parse_bitmap(&String::deserialize(deserializer)?, u32::BITS)?;
        Ok(Bitmap { filter: filter as u32, value: value as u32 })
    }
}

impl<'de> Deserialize<'de> for Bitmap<u64> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Bitmap<u64>, D::Error> {
        let (filter, value) = parse_bitmap(&String::deserialize(deserializer)?, u64::BITS)?;
        Ok(Bitmap { filter, value })
    }
}

fn bitmap_text(filter: u64, value: u64, bits: u32) -> String {
    let digit = |bit| match (filter >> bit & 1, value >> bit & 1) {
        (0, _) => 'x',
        (_, 0) => '0',
        _ => '1',
    };
    "0b".chars().chain((0..bits).rev().map(digit)).collect()
}

/// Filter and value; neither has a bit at or above `bits`.
fn parse_bitmap<E: de::Error>(text: &str, bits: u32) -> Result<(u64, u64), E> {
    let malformed =
        || E::custom(format!("`{text}` is not a bitmap; write `0b` and then 0, 1 or x for each bit"));
    let digits = text.strip_prefix("0b").ok_or_else(malformed)?;
    let (mut filter, mut value, mut count) = (0u64, 0u64, 0u32);
    for digit in digits.chars().filter(|digit| *digit != '_') {
        let (change, to) = match digit {
            'x' => (0, 0),
            '0' => (1, 0),
            '1' => (1, 1),
            _ => return Err(malformed()),
        };
        filter = filter << 1 | change;
        value = value << 1 | to;
        count += 1;
        if count > bits {
            return Err(E::custom(format!("`{text}` has more digits than the register's {bits} bits")));
        }
    }
    if count == 0 {
        return Err(malformed());
    }
    Ok((filter, value))
}

/// A `u32` as a text in hexadecimal (`0x`) or binary (`0b`); it is written in hexadecimal.
mod number_text {
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub fn serialize<S: Serializer>(number: &u32, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{number:#x}"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse(&text).ok_or_else(|| {
            de::Error::custom(format!(
                "`{text}` is not a number of 32 bits; write it in hexadecimal with `0x` or in binary with `0b`"
            ))
        })
    }

    fn parse(text: &str) -> Option<u32> {
        let (digits, radix) = match (text.strip_prefix("0x"), text.strip_prefix("0b")) {
            (Some(digits), _) => (digits, 16),
            (_, Some(digits)) => (digits, 2),
            _ => return None,
        };
        // `from_str_radix` would take a sign.
        if !digits.starts_with(|c: char| c.is_digit(radix)) {
            return None;
        }
        u32::from_str_radix(digits, radix).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bitmap(text: &str) -> Result<Bitmap<u32>, serde_json::Error> {
        serde_json::from_value(text.into())
    }

    #[test]
    fn a_bitmap_sets_clears_and_leaves_bits() {
        let bits = bitmap("0b1x0").unwrap();
        assert_eq!(bits, Bitmap { filter: 0b101, value: 0b100 });
        assert_eq!(bits.apply(0b1011), 0b1110);
        assert_eq!(bitmap("0b1_x_0").unwrap(), bits);
    }

    #[test]
    fn a_bitmap_has_as_many_digits_as_its_register_has_bits() {
        let full = format!("0b{}", "1".repeat(32));
        assert_eq!(bitmap(&full).unwrap(), Bitmap { filter: u32::MAX, value: u32::MAX });
        assert!(bitmap(&format!("{full}1")).unwrap_err().to_string().contains("32 bits"));
        let wide: Bitmap<u64> = serde_json::from_value(format!("0b{}", "x".repeat(64)).into()).unwrap();
        assert_eq!(wide.apply(7), 7);
        assert!(serde_json::from_value::<Bitmap<u64>>(format!("0b{}", "x".repeat(65)).into()).is_err());
        for bad in ["", "0b", "0b2", "0x1", "1", "0b1 0", "0b_"] {
            assert!(bitmap(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_number_is_hexadecimal_or_binary() {
        let addr = |text: &str| {
            let json = format!(r#"{{"addr":{text:?},"bitmap":"0b1"}}"#);
            serde_json::from_str::<MsrModifier>(&json).map(|modifier| modifier.addr)
        };
        assert_eq!(addr("0x10A").unwrap(), 0x10a);
        assert_eq!(addr("0b101").unwrap(), 5);
        for bad in ["10", "0x", "0b", "0x+1", "0b-1", "0xg", "0x100000000", "", "x"] {
            assert!(addr(bad).unwrap_err().to_string().contains("not a number of 32 bits"), "{bad:?}");
        }
    }

    #[test]
    fn what_was_read_is_written_so_that_it_reads_the_same() {
        let text = r#"{"kvm_capabilities":["1","!2"],
            "cpuid_modifiers":[{"leaf":"0x7","subleaf":"0x0","flags":1,
                                "modifiers":[{"register":"ebx","bitmap":"0bx01"}]}],
            "msr_modifiers":[{"addr":"0x10a","bitmap":"0b1x"}]}"#;
        let config: CpuConfig = serde_json::from_str(text).unwrap();
        let written = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<CpuConfig>(&written).unwrap(), config);
        assert!(written.contains(&format!("0b{}x01", "x".repeat(29))));
    }

    #[test]
    fn a_capability_is_a_number() {
        for bad in ["", "!", "x", "!-1", "-1", "4294967296"] {
            assert!(serde_json::from_value::<KvmCapability>(bad.into()).is_err(), "{bad:?}");
        }
    }
}
