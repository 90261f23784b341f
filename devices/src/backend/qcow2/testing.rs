//! Images for tests and fuzz targets, which have no `qemu-img`: without content, of the form that it makes.

/// What an image is to be.
#[derive(Clone, Copy, Debug)]
pub struct Blank<'a> {
    pub cluster_bits: u32,
    pub size: u64,
    /// What stands in its header; nobody believes it.
    pub backing: Option<&'a str>,
}

/// In clusters.
pub const L1_CLUSTER: u64 = 3;
const REFCOUNT_TABLE_CLUSTER: u64 = 1;
const REFCOUNT_BLOCK_CLUSTER: u64 = 2;
const HEADER_BYTES: u64 = 104;

impl Blank<'_> {
    /// The header, one cluster of a refcount table, a block of reference counts, the L1 table.
    pub fn bytes(&self) -> Vec<u8> {
        let cluster = 1 << self.cluster_bits;
        let l1_entries = self.size.div_ceil(1 << (2 * self.cluster_bits - 3));
        let l1_bytes = (l1_entries * 8).next_multiple_of(8);
        let used = L1_CLUSTER + (l1_entries * 8).div_ceil(cluster);
        let mut image = vec![0; (L1_CLUSTER * cluster + l1_bytes) as usize];
        let mut put = |at: u64, value: &[u8]| {
            image[at as usize..at as usize + value.len()].copy_from_slice(value);
        };
        put(0, b"QFI\xfb");
        put(4, &3_u32.to_be_bytes());
        put(20, &self.cluster_bits.to_be_bytes());
        put(24, &self.size.to_be_bytes());
        put(36, &(l1_entries as u32).to_be_bytes());
        put(40, &(L1_CLUSTER * cluster).to_be_bytes());
        put(48, &(REFCOUNT_TABLE_CLUSTER * cluster).to_be_bytes());
        put(56, &1_u32.to_be_bytes());
        put(96, &4_u32.to_be_bytes());
        put(100, &(HEADER_BYTES as u32).to_be_bytes());
        if let Some(name) = self.backing {
            let at = HEADER_BYTES + 8;
            put(8, &at.to_be_bytes());
            put(16, &(name.len() as u32).to_be_bytes());
            put(at, name.as_bytes());
        }
        put(REFCOUNT_TABLE_CLUSTER * cluster, &(REFCOUNT_BLOCK_CLUSTER * cluster).to_be_bytes());
        for number in 0..used {
            put(REFCOUNT_BLOCK_CLUSTER * cluster + 2 * number, &1_u16.to_be_bytes());
        }
        image
    }
}
