//! Users of the guest, out of its /etc/passwd and /etc/group read as text: users that come from elsewhere, such as a
//! directory service, are not known here.

use std::fs::File;
use std::io::{self, Read};

/// What is read of each file.
const MAX_FILE: u64 = 1 << 20;

/// Groups of one user, as many as Linux allows (NGROUPS_MAX).
const MAX_GROUPS: usize = 65536;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    /// All others that it is in.
    pub groups: Vec<u32>,
    pub home: String,
    pub shell: String,
}

/// Looks a user up by name or number. Root is there even in a root without any file, and any number may be used.
pub fn find(wanted: &str) -> Result<User, String> {
    let read = |path| read(path).unwrap_or_default();
    find_in(wanted, &read("/etc/passwd"), &read("/etc/group"))
}

fn read(path: &str) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_FILE).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn find_in(wanted: &str, passwd: &str, group: &str) -> Result<User, String> {
    let number = wanted.parse::<u32>().ok();
    let users = || passwd.lines().filter_map(user);
    let found =
        users().find(|user| user.name == wanted).or_else(|| users().find(|user| Some(user.uid) == number));
    let mut user = match (found, number) {
        (Some(user), _) => user,
        (None, _) if wanted == "root" => unlisted("root", 0),
        (None, Some(uid)) => unlisted(wanted, uid),
        (None, None) => return Err(format!("the guest's /etc/passwd has no user {wanted:?}")),
    };
    user.groups = groups(&user.name, user.gid, group);
    Ok(user)
}

fn unlisted(name: &str, id: u32) -> User {
    let home = if id == 0 { "/root" } else { "/" };
    User {
        name: name.into(),
        uid: id,
        gid: id,
        groups: Vec::new(),
        home: home.into(),
        shell: "/bin/sh".into(),
    }
}

/// A line of passwd(5): name, password, number, group, comment, home, shell.
fn user(line: &str) -> Option<User> {
    let mut fields = line.split(':');
    let mut next = || fields.next();
    let name = next().filter(|name| !name.is_empty())?;
    let _password = next()?;
    let (uid, gid) = (next()?.parse().ok()?, next()?.parse().ok()?);
    let _comment = next()?;
    let home = next()?;
    // Where nothing is said, as login(1) has it.
    let or = |field: &str, usual: &str| if field.is_empty() { usual.to_owned() } else { field.to_owned() };
    Some(User {
        name: name.into(),
        uid,
        gid,
        groups: Vec::new(),
        home: or(home, "/"),
        shell: or(next().unwrap_or_default(), "/bin/sh"),
    })
}

/// Lines of group(5): name, password, number, members.
fn groups(name: &str, own: u32, group: &str) -> Vec<u32> {
    let mut groups = vec![own];
    for line in group.lines() {
        let fields: Vec<_> = line.splitn(4, ':').collect();
        if let [_, _, id, members] = fields[..]
            && let Ok(id) = id.parse()
            && members.split(',').any(|member| member.trim() == name)
            && !groups.contains(&id)
            && groups.len() < MAX_GROUPS
        {
            groups.push(id);
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\n\nbroken\n:x:5:5::/:\n\
                          daemon:x:1:1::/usr/sbin:/usr/sbin/nologin\nweb:x:1000:1000:Web,,,:/home/web:\n1000:x:7:7::/seven:/bin/sh";
    const GROUP: &str =
        "root:x:0:\nsudo:x:27:other,web\nweb:x:1000:web\nbroken:x\naudio:x:29:webmaster\ndisk:x:6:web";

    #[test]
    fn a_user_is_found_by_name_and_by_number() {
        let web = find_in("web", PASSWD, GROUP).unwrap();
        let wanted = User {
            name: "web".into(),
            uid: 1000,
            gid: 1000,
            groups: vec![1000, 27, 6],
            home: "/home/web".into(),
            shell: "/bin/sh".into(),
        };
        assert_eq!(web, wanted);
        assert_eq!(find_in("1", PASSWD, GROUP).unwrap().name, "daemon");
        // A name that is a number comes first.
        assert_eq!(find_in("1000", PASSWD, GROUP).unwrap().uid, 7);
    }

    #[test]
    fn who_is_not_listed_is_root_or_a_number_or_nobody() {
        assert_eq!(find_in("root", "", "").unwrap().home, "/root");
        let unlisted = find_in("4711", PASSWD, GROUP).unwrap();
        assert_eq!((unlisted.uid, unlisted.gid, unlisted.groups), (4711, 4711, vec![4711]));
        assert!(find_in("nobody", PASSWD, GROUP).unwrap_err().contains("\"nobody\""));
        assert!(find_in("", PASSWD, GROUP).is_err());
    }

    proptest! {
        #[test]
        fn any_file_is_read_without_a_panic(passwd in "([a-z0-9:,\\n]|\\PC){0,200}", group in "([a-z0-9:,\\n]|\\PC){0,200}") {
            let _ = find_in("a", &passwd, &group);
            prop_assert_eq!(find_in("root", &passwd, &group).unwrap().name, "root");
        }
    }
}
